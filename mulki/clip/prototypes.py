"""Visual prototypes: normalised class means of image features."""

from __future__ import annotations

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki.ops import checks

Update = Literal["ema", "batch", "learnable", "fixed"]

# Rows whose classes are compared at a time: [C, rows] are compared.
_ROWS = 2**14


def class_sums(features: Tensor, target: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Per class, the sum of features [C, D] and the number of rows [C]; features are [N, D].

    A row whose target is not a class is left out.
    """
    classes = torch.arange(num_classes, device=target.device).unsqueeze(1)
    sums, counts = [], []
    for rows, targets in zip(features.split(_ROWS), target.split(_ROWS), strict=True):
        members = (targets == classes).to(features.dtype)
        with torch.autocast(features.device.type, enabled=False):
            sums.append(members @ rows)
        counts.append(members.sum(dim=1))
    return torch.stack(sums).sum(dim=0), torch.stack(counts).sum(dim=0)


def class_means(features: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Normalised class means: the initial prototypes of MulKI (one per class of the task).

    Args:
        features: [N, D] L2-normalised image features of the task's training set.
        target: [N] int64 in [0, C).
        num_classes: C.

    Returns:
        [C, D], unit rows.

    Raises:
        TypeError, ValueError: a target is no class, or a class has no sample.
    """
    checks.is_tensor("target", target, "an int64 tensor of class indices")
    checks.dtype("target", target, torch.int64, "long")
    checks.target_values(target, num_classes)
    sums, counts = class_sums(features, target, num_classes)
    if not counts.all():
        empty = torch.nonzero(counts == 0).flatten().tolist()
        raise ValueError(f"target: holds no sample of class {empty[0]} (of {num_classes} classes)")
    return F.normalize(sums, dim=1)


class Prototypes(nn.Module):
    """The student's prototypes of one task, and how they change during training.

    ``ema``: ``p_c <- normalize(m p_c + (1 - m) mean of the batch's features of class c)`` for the
    classes present in the batch. ``batch``: the same average, but a batch is compared with the
    prototypes that it has moved already, so that their gradient reaches its images. ``learnable``:
    parameters, normalised when read, trained with the losses. ``fixed``: they do not change.

    Args:
        initial: [C, D] unit rows.
        update: "ema", "batch", "learnable" or "fixed".
        momentum: m in [0, 1], used by "ema" and "batch".

    Raises:
        TypeError: a momentum that is no number.
        ValueError: an unknown `update`, or a momentum out of bounds.

    Examples:
        >>> features = F.normalize(torch.randn(8, 512), dim=1)
        >>> target = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3])
        >>> prototypes = Prototypes(class_means(features, target, num_classes=4))
        >>> prototypes.observe(features[:2], target[:2])  # after each step
        >>> prototypes().shape
        torch.Size([4, 512])
    """

    def __init__(self, initial: Tensor, update: Update = "ema", momentum: float = 0.9):
        super().__init__()
        checks.choice("update", update, get_args(Update))
        checks.fraction("momentum", momentum)
        self.update = update
        self.momentum = momentum
        self.value: Tensor
        if update == "learnable":
            self.value = nn.Parameter(initial.detach().clone())
        else:
            self.register_buffer("value", initial.detach().clone())

    def forward(self) -> Tensor:
        """The prototypes [C, D], unit rows; differentiable if they are learnable."""
        return F.normalize(self.value, dim=1) if self.update == "learnable" else self.value

    def with_batch(self, features: Tensor, target: Tensor) -> Tensor:
        """What a batch is compared with [C, D]: with "batch" the moved prototypes, else these.

        Args:
            features: [B, D] of the student.
            target: [B] classes.
        """
        return self._moved(features, target) if self.update == "batch" else self()

    @torch.no_grad()
    def observe(self, features: Tensor, target: Tensor) -> None:
        """Update the running means with a batch, where they are such means.

        Args:
            features: [B, D] of the student.
            target: [B] classes.
        """
        if self.update in ("ema", "batch"):
            # Not in place: the losses of this step may have saved the old tensor for their
            # backward pass.
            self.value = self._moved(features, target)

    def _moved(self, features: Tensor, target: Tensor) -> Tensor:
        sums, counts = class_sums(features.to(self.value.dtype), target, len(self.value))
        means = sums / counts.clamp(min=1).unsqueeze(1)
        moved = F.normalize(self.momentum * self.value + (1 - self.momentum) * means, dim=1)
        return torch.where((counts > 0).unsqueeze(1), moved, self.value)
