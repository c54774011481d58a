"""The contrastive loss of CLIP behind open_clip's interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mulki.distributed import collectives
from mulki.functional import clip_contrastive, prototype_cross_entropy
from mulki.losses.pairs import Columns, PairLoss, Pairs, Shard
from mulki.ops.arguments import with_bias


class ClipLoss(PairLoss):
    """The symmetric contrastive loss of CLIP (arXiv 2103.00020), in place of open_clip's.

    ``1/2 [CE(z, diagonal) + CE(z.T, diagonal)]`` with ``z = logit_scale * images @ texts.T`` over
    the batch of all ranks. Takes the arguments of open_clip 3.3 and of its main branch, and returns
    the same values; memory kept for backward is O(B D), for the logits are never stored.

    Under `torch.distributed` the gradients of features, scale and bias, averaged over the ranks as
    DDP and FSDP do, are those of one process with the whole batch, whatever the flags say, and
    batches may be uneven. In open_clip this holds with ``gather_with_grad=True`` alone; without it
    tower gradients are divided by the world size, or with ``local_loss=True`` biased.

    Args:
        local_loss: the value returned on a rank is the mean over its own rows, not over all.
        gather_with_grad: not needed for right gradients; flags that make open_clip's gradients
            others than those of the batch are warned of, once.
        cache_labels: keep the labels that `get_ground_truth` makes.
        rank: that of the process group, which is asked itself; another one is an error.
        world_size: as `rank`.
        use_horovod: not used.
        group: the process group whose ranks share the batch, the default one if None.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int | None = None,
        world_size: int | None = None,
        use_horovod: bool | None = None,
        *,
        group: collectives.Group | None = None,
    ) -> None:
        notes = {}
        if use_horovod:
            notes["use_horovod"] = "not used, ranks are those of torch.distributed"
        super().__init__(rank, world_size, group, notes)
        self.local_loss = bool(local_loss)
        self.gather_with_grad = bool(gather_with_grad)
        self.cache_labels = bool(cache_labels)
        self._labels: dict[tuple[Any, ...], Tensor] = {}
        self._shard: Shard | None = None  # of the last call, which labels are for

    def shard(self, student: Pairs, *teachers: Pairs, **facts: object) -> Shard:
        shard = super().shard(student, *teachers, local_loss=self.local_loss, **facts)
        copied = self.local_loss or any(given is not None for given in self._given.values())
        if shard.world > 1 and copied and not self.gather_with_grad and shard.rank == 0:
            theirs = "biased" if self.local_loss else f"1/{shard.world} as large in the towers"
            self.say_once(
                "flags",
                f"with local_loss={self.local_loss} and gather_with_grad=False gradients are "
                f"{theirs} in open_clip; here they are those of the whole batch, as with "
                f"gather_with_grad=True; pass that to acknowledge it",
            )
        self._shard = shard
        return shard

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with `output_dict` ``{"contrastive_loss": loss}``.

        Args:
            image_features: [n, D] of this rank, L2-normalised; row i belongs to row i of the texts.
            text_features: [n, D].
            logit_scale: already exponentiated.
            logit_bias: a softmax does not see it; its gradient is zero.

        Raises:
            TypeError, ValueError: naming the argument, on all ranks alike.
        """
        pairs = Pairs("", image_features, text_features, logit_scale, logit_bias)
        shard = self.shard(pairs)
        total = self.contrastive_sum(shard, self.columns(shard, pairs))
        losses = self.reported(shard, {"contrastive_loss": total}, self.local_loss)
        return losses if output_dict else losses["contrastive_loss"]

    def contrastive_sum(self, shard: Shard, columns: Columns) -> Tensor:
        """The sum of the losses of this rank's pairs."""
        pairs = columns.pairs
        if shard.world == 1:
            operands = pairs.images, pairs.texts, pairs.scale, pairs.bias
            return clip_contrastive(*operands, reduction="sum")
        target = self.targets(shard, pairs.images.device)
        of_images, of_texts = (
            prototype_cross_entropy(rows, target, reduction="sum")
            for rows in (columns.of_images(), columns.of_texts())
        )
        return with_bias((of_images + of_texts) / 2, pairs.bias)

    def targets(self, shard: Shard, device: torch.device) -> Tensor:
        """[n], the column of the batch that is each own row's match."""
        return torch.arange(shard.offset, shard.offset + shard.rows, device=device)

    def get_ground_truth(self, device: torch.device | str, num_logits: int) -> Tensor:
        """The labels of the rows that `get_logits` returned last, [num_logits] int64."""
        shard = self._shard
        local = self.local_loss and shard is not None and shard.world > 1
        first = shard.offset if local and shard is not None else 0
        key = str(device), num_logits, first
        labels = self._labels.get(key)
        if labels is None:
            # What is cached may be used in training, too.
            with torch.inference_mode(False):
                labels = torch.arange(first, first + num_logits, device=device)
            if self.cache_labels:
                self._labels = {key: labels}
        return labels

    def get_logits(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The logit matrices per image and per text, which `forward` never makes.

        [N, N] of all ranks' pairs, or with `local_loss` [n, N] of this rank's against all.
        Differentiable; gradients of all ranks flow back to where features are.
        """
        pairs = Pairs("", image_features, text_features, logit_scale, logit_bias)
        shard = self.shard(pairs)
        columns = self.columns(shard, pairs)
        # As in open_clip, one is a view of the other where all ranks' pairs are gathered.
        if self.local_loss or shard.world == 1:
            matrices = [columns.of_images().materialize(), columns.of_texts().materialize()]
        else:
            everyone = Pairs("", columns.images, columns.texts, pairs.scale)
            of_all = Columns(everyone, columns.images, columns.texts).of_images().materialize()
            matrices = [of_all, of_all.T]
        per_image, per_text = (
            matrix if pairs.bias is None else matrix + pairs.bias for matrix in matrices
        )
        return per_image, per_text
