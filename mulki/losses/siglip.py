"""The sigmoid loss of SigLIP behind open_clip's interface."""

from __future__ import annotations

import torch
from torch import Tensor

from mulki import ops
from mulki.distributed import collectives
from mulki.losses.pairs import PairLoss, Pairs, Shard
from mulki.ops import checks

RING = ("bidir", "shift")
GATHERED = ("gather", "reduce")


class SigLipLoss(PairLoss):
    """The pairwise sigmoid loss of SigLIP (arXiv 2303.15343), in place of open_clip's.

    ``-sum_ij log sigmoid(y_ij (logit_scale u_i.w_j + logit_bias)) / N`` with y = +1 for the pairs
    and -1 otherwise. Takes the arguments of open_clip 3.3 and of its main branch. Its value on a
    rank is that of the rank's images against all texts, divided by how many these images are, as
    in open_clip; gradients, averaged over the ranks, are those of one process with the whole
    batch. Memory kept for backward is O(B D).

    Args:
        cache_labels: not needed, for there are no labels to keep.
        rank: that of the process group, which is asked itself; another one is an error.
        world_size: as `rank`.
        dist_impl: how texts meet all images. "bidir" (also None) and "shift" pass them round a
            ring, in both directions or in one; "gather" and "reduce" gather them.
        chunk_size: not used; nothing is stored that chunks would make smaller.
        group: the process group whose ranks share the batch, the default one if None.

    Keywords of older versions of open_clip are taken with a warning: `bidir` chooses between
    "bidir" and "shift", `use_horovod` is not used.
    """

    softmax = False

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        dist_impl: str | None = None,
        chunk_size: int | None = None,
        *,
        group: collectives.Group | None = None,
        bidir: bool | None = None,
        use_horovod: bool | None = None,
    ) -> None:
        if isinstance(dist_impl, bool):  # where older versions have `bidir`
            bidir, dist_impl = dist_impl, None
        given = {"bidir": bidir, "chunk_size": chunk_size, "use_horovod": use_horovod or None}
        notes = {name: "not used" for name, value in given.items() if value is not None}
        if bidir is not None and dist_impl is None:
            dist_impl = "bidir" if bidir else "shift"
            notes["bidir"] = f"read as dist_impl={dist_impl!r}"
        super().__init__(rank, world_size, group, notes)
        self.cache_labels = bool(cache_labels)
        self.dist_impl = dist_impl or "bidir"
        checks.choice("dist_impl", self.dist_impl, RING + GATHERED)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with `output_dict` ``{"contrastive_loss": loss}``.

        Args:
            image_features: [n, D] of this rank, L2-normalised; row i belongs to row i of the texts.
            text_features: [n, D].
            logit_scale: already exponentiated.
            logit_bias: None for 0.

        Raises:
            TypeError, ValueError: naming the argument, on all ranks alike.
        """
        pairs = Pairs("", image_features, text_features, logit_scale, logit_bias)
        shard = self.shard(pairs, dist_impl=self.dist_impl)
        if shard.world == 1 or self.dist_impl in GATHERED:
            texts = self.gathered(shard, pairs.texts)
            total = _block(pairs, texts, shard.offset)
        else:
            total = self._round_the_ring(shard, pairs)
        losses = self.reported(shard, {"contrastive_loss": total}, own=True)
        return losses if output_dict else losses["contrastive_loss"]

    def _round_the_ring(self, shard: Shard, pairs: Pairs) -> Tensor:
        """This rank's images against its own texts, then those of one rank after another."""
        total = _block(pairs, pairs.texts, 0)
        both = (shard.world - 1) // 2 if self.dist_impl == "bidir" else 0
        right = left = pairs.texts
        for hop in range(1, shard.world - both):
            before = shard.sizes[(shard.rank - hop) % shard.world]
            if hop <= both:
                after = shard.sizes[(shard.rank + hop) % shard.world]
                held = (right, left), (1, -1), (before, after)
                right, left = came = collectives.ring_pass(*held, self.group)
            else:
                (right,) = came = collectives.ring_pass((right,), (1,), (before,), self.group)
            for texts in came:
                # Behind the last column: all of them are negatives.
                total = total + _block(pairs, texts, texts.shape[0])
        return total

    def get_ground_truth(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        num_logits: int,
        negative_only: bool = False,
    ) -> Tensor:
        """The signs y [num_logits, num_logits], which `forward` never makes."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        return labels if negative_only else labels.fill_diagonal_(1)

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> Tensor:
        """The logits [n, m] of these features, of this rank alone, which `forward` never makes."""
        pairs = Pairs("", image_features, text_features, logit_scale, logit_bias)
        names = "image_features", "text_features", "logit_scale"
        checks.inputs(pairs.images, pairs.texts, pairs.scale, names)
        if pairs.bias is not None:
            checks.scalar("logit_bias", pairs.bias, pairs.images.device)
        logits = ops.similarity.matrix((pairs.images, pairs.texts, pairs.scale))
        return logits if pairs.bias is None else logits + pairs.bias


def _block(pairs: Pairs, texts: Tensor, offset: int) -> Tensor:
    """The sum of the losses of the pairs' images against these texts; row i matches i + offset."""
    bias = 0.0 if pairs.bias is None else pairs.bias
    return ops.siglip.loss((pairs.images, texts, pairs.scale), bias, "sum", offset)
