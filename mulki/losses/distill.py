"""Distillation from one teacher, or from two, behind open_clip's interface."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.distributed import collectives
from mulki.losses.clip import ClipLoss
from mulki.losses.pairs import Columns, Pairs, Shard
from mulki.ops import checks, pair_kl, teacher_kl
from mulki.ops.arguments import with_bias
from mulki.ops.gates import Weighting
from mulki.representation import arguments_shown

Losses = tuple[Tensor, Tensor] | dict[str, Tensor]
Number = Tensor | float


class DistillClipLoss(ClipLoss):
    """The contrastive loss, and a teacher's logits as soft targets, in place of open_clip's.

    The second term is ``1/2 [CE(p, q) + CE(p', q')]``: the cross-entropy of the student's softmax q
    over all texts against the teacher's p, of every image, and the same over all images of every
    text, with primes. It is the KL divergence plus the teacher's entropy, which has no gradient.
    With a temperature T both softmax are of logits / T and the term is multiplied by T^2 (Hinton
    et al., arXiv 1503.02531). The teacher may have another width than the student, and either may
    have a logit bias, which a softmax does not see. No gradient flows to the teacher.

    Args:
        temperature: T > 0; open_clip has 1.

    The other arguments are those of `ClipLoss`.
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
        temperature: float = 1.0,
        group: collectives.Group | None = None,
    ) -> None:
        flags = local_loss, gather_with_grad, cache_labels
        super().__init__(*flags, rank, world_size, use_horovod, group=group)
        checks.temperature("temperature", temperature)
        self.temperature = temperature
        self._weigh(Weighting.of("uniform"))

    def _weigh(self, weighting: Weighting) -> None:
        self.weighting = weighting
        # Here, since torch.compile takes no text of a number that differs between two losses.
        self._gate = " ".join(map(str, (weighting.gate.name, *weighting.numbers)))

    def dist_loss(self, teacher_logits: Tensor, student_logits: Tensor) -> Tensor:
        """The cross-entropy of logits [n, N] against a teacher's, the mean over rows."""
        t = self.temperature
        q = F.log_softmax(student_logits / t, dim=1)
        return -(F.softmax(teacher_logits / t, dim=1) * q).sum(dim=1).mean() * t**2

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Number,
        output_dict: bool = False,
        logit_bias: Number | None = None,
        dist_logit_bias: Number | None = None,
    ) -> Losses:
        """``(contrastive_loss, distill_loss)``, or with `output_dict` a dictionary of the two.

        Args:
            image_features: [n, D] of this rank, L2-normalised; row i belongs to row i of the texts.
            text_features: [n, D].
            logit_scale: already exponentiated.
            dist_image_features: [n, D'], the teacher's of the same images.
            dist_text_features: [n, D'].
            dist_logit_scale: the teacher's.
            logit_bias: not seen by a softmax; the gradient is zero.
            dist_logit_bias: the teacher's, not seen either.

        Raises:
            TypeError, ValueError: naming the argument, on all ranks alike.
        """
        student = Pairs("", image_features, text_features, logit_scale, logit_bias)
        teacher = Pairs(
            "dist_", dist_image_features, dist_text_features, dist_logit_scale, dist_logit_bias
        )
        return self._distilled(student, [teacher], output_dict)

    def _distilled(self, student: Pairs, teachers: Sequence[Pairs], output_dict: bool) -> Losses:
        named = [item for teacher in teachers for item in teacher.features().items()]
        for name in [name for name, t in named if isinstance(t, Tensor) and t.requires_grad][:1]:
            self.say_once(
                "teacher",
                f"{name}: requires grad, but no gradient flows to a teacher, other than in "
                f"open_clip; compute it under torch.no_grad()",
            )
        teachers = [teacher.detached() for teacher in teachers]
        shard = self.shard(student, *teachers, gate=self._gate, temperature=self.temperature)
        # The backward of both losses in one reads upstream gradients: a GPU would be waited for.
        if shard.world == 1 and student.images.device.type == "cpu":
            sums = self._sums_in_one_pass(student, teachers)
        else:
            of_student, *others = (self.columns(shard, pairs) for pairs in (student, *teachers))
            sums = {
                "contrastive_loss": self.contrastive_sum(shard, of_student),
                "distill_loss": torch.add(*self._of_pairs(student, teachers, labels=False))
                if shard.world == 1
                else self._distill_sum(shard, of_student, others),
            }
        losses = self.reported(shard, sums, self.local_loss)
        return losses if output_dict else (losses["contrastive_loss"], losses["distill_loss"])

    def _sums_in_one_pass(self, student: Pairs, teachers: Sequence[Pairs]) -> dict[str, Tensor]:
        # Where one process holds the batch, both losses share their products.
        sums, entropy = self._of_pairs(student, teachers, labels=True)
        contrastive, kl = sums.unbind()
        contrastive = with_bias(contrastive, student.bias)
        return {"contrastive_loss": contrastive, "distill_loss": kl + entropy}

    def _of_pairs(
        self, student: Pairs, teachers: Sequence[Pairs], labels: bool
    ) -> tuple[Tensor, Tensor]:
        # The sums of the losses, and of the entropies; rows and columns share their products.
        options = self.temperature, True, None, self.weighting, "sum", labels
        others = [teacher.operands() for teacher in teachers]
        loss, _, weights, entropy = pair_kl.loss(student.operands(), others, *options)
        return loss, self.temperature**2 * (weights * entropy).sum() / 2

    def _distill_sum(self, shard: Shard, student: Columns, teachers: Sequence[Columns]) -> Tensor:
        looked_at = self.weighting.uses_target
        target = self.targets(shard, student.images.device) if looked_at else None
        total: Tensor | float = 0.0
        for side in (Columns.of_images, Columns.of_texts):
            options = self.temperature, True, None, self.weighting, target, None, "sum"
            others = [side(teacher).operands for teacher in teachers]
            kl, _, weights, entropies = teacher_kl.loss(side(student).operands, others, *options)
            entropy = (weights * entropies).sum()
            total = total + (kl + self.temperature**2 * entropy) / 2
        assert isinstance(total, Tensor)
        return total


class DualTeacherClipLoss(DistillClipLoss):
    """`DistillClipLoss` with a second teacher: the original model, and the one before this task.

    The distillation term of a row is the sum of both teachers' cross-entropies, weighted by a gate
    (see `mulki.functional.teacher_kl`) whose weights sum to 1. Where a gate looks at a row's
    label, that is its own pair; the gate "discrepancy" wants teachers of one width. The
    defaults are those of `mulki.functional.dual_teacher_kl`.

    Args:
        gate: a name in `mulki.ops.gates.gate_names()`.
        gate_temperature: > 0, smaller is sharper.
        gate_entropy: a of the gate "blend", see `mulki.functional.teacher_kl`.
        gate_label: b of the gate "blend".
        temperature: T > 0 of both softmax.

    The other arguments are those of `ClipLoss`.
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
        gate: str = "label",
        gate_temperature: float = 1.0,
        gate_entropy: float | None = None,
        gate_label: float | None = None,
        temperature: float = 2.0,
        group: collectives.Group | None = None,
    ) -> None:
        ranks = rank, world_size, use_horovod
        super().__init__(
            *(local_loss, gather_with_grad, cache_labels, *ranks),
            temperature=temperature,
            group=group,
        )
        self._weigh(Weighting.of(gate, gate_temperature, gate_entropy, gate_label))
        checks.temperature("gate_temperature", gate_temperature)

    def extra_repr(self) -> str:
        return arguments_shown(self, **self._given, **self.weighting.arguments)

    def forward(  # type: ignore[override]
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Number,
        dist_image_features: Tensor,
        dist_text_features: Tensor,
        dist_logit_scale: Number,
        prev_image_features: Tensor,
        prev_text_features: Tensor,
        prev_logit_scale: Number,
        output_dict: bool = False,
        logit_bias: Number | None = None,
        dist_logit_bias: Number | None = None,
        prev_logit_bias: Number | None = None,
    ) -> Losses:
        """``(contrastive_loss, distill_loss)``, or with `output_dict` a dictionary of the two.

        Arguments as `DistillClipLoss.forward`: ``dist_*`` are the original model's, ``prev_*``
        those of the model after the previous task, each of its own width.
        """
        student = Pairs("", image_features, text_features, logit_scale, logit_bias)
        original = Pairs(
            "dist_", dist_image_features, dist_text_features, dist_logit_scale, dist_logit_bias
        )
        previous = Pairs(
            "prev_", prev_image_features, prev_text_features, prev_logit_scale, prev_logit_bias
        )
        return self._distilled(student, [original, previous], output_dict)
