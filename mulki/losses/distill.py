"""Distillation from one teacher, or from two, behind open_clip's interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.distributed import collectives
from mulki.losses.clip import ClipLoss
from mulki.losses.pairs import Columns, Pairs, Shard
from mulki.ops import checks, pair_kl, teacher_kl, torch_private
from mulki.ops.arguments import scalar, with_bias
from mulki.ops.gates import Weighting
from mulki.ops.pair_kl import PairKl
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

    On the CPU of one process the sum of the two losses takes one pass over the logits. Weights that
    a user multiplies them by, or a gradient of one of them alone, are right but take further
    passes, of which a warning tells once: give the weight as `distill_weight`.

    Args:
        temperature: T > 0; open_clip has 1.
        distill_weight: >= 0, what the second term is multiplied by.

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
        distill_weight: float = 1.0,
        group: collectives.Group | None = None,
    ) -> None:
        flags = local_loss, gather_with_grad, cache_labels
        super().__init__(*flags, rank, world_size, use_horovod, group=group)
        checks.temperature("temperature", temperature)
        checks.finite_number("distill_weight", distill_weight)
        if distill_weight < 0:
            raise ValueError(f"distill_weight: got {distill_weight}, wanted a number >= 0")
        self.temperature = temperature
        self.distill_weight = float(distill_weight)
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
        options = {"temperature": self.temperature, "distill_weight": self.distill_weight}
        shard = self.shard(student, *teachers, gate=self._gate, **options)
        if shard.world == 1 and _can_be_one_pass(student.images):
            losses = self._in_one_pass(student, teachers)
        else:
            of_student, *others = (self.columns(shard, pairs) for pairs in (student, *teachers))
            distilled = (
                self._distill_sum_of_pairs(student, teachers)
                if shard.world == 1
                else self._distill_sum(shard, of_student, others)
            )
            sums = {
                "contrastive_loss": self.contrastive_sum(shard, of_student),
                "distill_loss": self.distill_weight * distilled,
            }
            losses = self.reported(shard, sums, self.local_loss)
        return losses if output_dict else (losses["contrastive_loss"], losses["distill_loss"])

    def _in_one_pass(self, student: Pairs, teachers: Sequence[Pairs]) -> dict[str, Tensor]:
        models = teacher_kl.in_one_dtype(student.operands(), [t.operands() for t in teachers])
        own, *others = ((x, w, scalar(scale, x)) for x, w, scale in models)
        options = self.temperature, True, None, self.weighting, "mean", self.distill_weight, 1.0
        both, *details = pair_kl.loss(own, others, *options)
        operands = [tensor for model in (own, *others) for tensor in model]
        contrastive, distill = _Apart.apply(self, both, details, *operands)
        contrastive = with_bias(contrastive, student.bias)
        return {"contrastive_loss": contrastive, "distill_loss": distill}

    def _distill_sum_of_pairs(self, student: Pairs, teachers: Sequence[Pairs]) -> Tensor:
        # Rows and columns share their products.
        options = self.temperature, True, None, self.weighting, "sum"
        others = [teacher.operands() for teacher in teachers]
        loss, _, weights, entropy, _ = pair_kl.loss(student.operands(), others, *options)
        return loss + self.temperature**2 * (weights * entropy).sum() / 2

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


def _can_be_one_pass(images: Tensor) -> bool:
    # The backward pass of `_Apart` reads upstream gradients: a GPU would be waited for, and neither
    # a compiler nor a transform has them.
    return (
        images.is_cpu
        and torch_private.has_values(images)
        and torch_private.reason() is None
        and not torch_private.transform_is_active()
    )


class _Apart(torch.autograd.Function):
    """The contrastive and the distillation loss, of which `both` is the sum.

    Where they have one upstream gradient, so has `both`. Otherwise their gradients are computed
    anew, each by its own operator.
    """

    @staticmethod
    def forward(
        ctx: Any,
        module: DistillClipLoss,
        both: Tensor,
        details: Sequence[Tensor],  # of pair_kl
        *operands: Tensor,  # three of the student, then of each teacher
    ) -> tuple[Tensor, Tensor]:
        kl, weights, entropy, labels = details
        ctx.module = module
        ctx.options = module.temperature, module.distill_weight
        ctx.set_materialize_grads(False)
        # Inference tensors, as of frozen teachers, cannot be saved, but a copy can.
        kept = (one.clone() if one.is_inference() else one for one in (weights, *operands))
        ctx.save_for_backward(*kept)
        temperature, weight = ctx.options
        distill = (weights * (kl + temperature**2 * entropy)).sum() * (weight / 2)
        return labels.mean(), distill / len(labels)

    @staticmethod
    def backward(ctx: Any, of_labels: Tensor | None, of_teachers: Tensor | None) -> Any:
        weights, *operands = ctx.saved_tensors
        none = [None] * len(operands)
        if of_labels is None and of_teachers is None:
            return None, None, None, *none
        if _are_equal(of_labels, of_teachers):
            return None, of_labels, None, *none
        ctx.module.say_once(
            "weights",
            "got other gradients of its two losses than those of their sum, which take further "
            "passes; pass distill_weight=... in place of multiplying the losses",
        )
        temperature, weight = ctx.options
        (images, texts, scale), wanted = operands[:3], list(ctx.needs_input_grad[3:6])
        found = []
        if of_labels is not None:
            gradients = torch.ops.mulki.contrastive(images, texts, scale, of_labels, "mean", wanted)
            found.append(gradients[-3:])
        if of_teachers is not None:
            teachers = operands[3::3], operands[4::3], operands[5::3]
            x = PairKl(images, texts, scale, *teachers, weights, temperature, weight=weight)
            found.append(torch.ops.mulki.pair_kl(*x, of_teachers, "mean", wanted)[-3:])
        sums = [
            sum(parts) if want else None
            for parts, want in zip(zip(*found, strict=True), wanted, strict=True)
        ]
        return None, None, None, *sums, *none[3:]


def _are_equal(one: Tensor | None, other: Tensor | None) -> bool:
    # Whether values may be read, and are the same.
    if one is None or other is None or not (torch_private.is_plain(one) and one.is_cpu):
        return False
    return torch_private.is_plain(other) and torch.equal(one, other)


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
        distill_weight: >= 0, what the second term is multiplied by.

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
        distill_weight: float = 1.0,
        group: collectives.Group | None = None,
    ) -> None:
        ranks = rank, world_size, use_horovod
        super().__init__(
            *(local_loss, gather_with_grad, cache_labels, *ranks),
            temperature=temperature,
            distill_weight=distill_weight,
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
