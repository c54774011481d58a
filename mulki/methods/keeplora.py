"""keeplora: adapters that move weights only where neither the model nor earlier tasks look.

    L = CE(s u w^T, y)
    W' = W + alpha / r  B A                 W [out, in], A [r, in] fixed, B [out, r] learned
    A  = first r right singular vectors of  G (I - M M^T)
    M  = orthonormal basis of [P, T]        [in, k]

G is the mean gradient of the cross-entropy over the task's training images at its start. P are the
first right singular vectors of W that hold `energy_image` (or `energy_text`) of the sum of its
squared singular values: what the model knows. T are directions of the inputs of W in earlier tasks,
which hold `energy_tasks` of their squared length: after each task those are added that are missing.
With `layer_scale` g below 1, the change of the l-th of a tower's L weights counts g + (1 - g) l /
(L - 1) times.

Source: KeepLoRA (ICLR 2026), and for `layer_scale` KeepLoRA++, by their code (MIT). Other than
there: B begins at zero, where they begin at the projected gradient's S V^T and take the product off
W, which is the same function and the same steps but for weight decay; directions in which the
gradient is but rounding are left out; inputs are summed over all
batches, where theirs are averaged by place over batches; M has an orthonormal basis of both parts;
and weights are counted by their order in the tower, of which a transformer's layer has several.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mulki.choices.options import option
from mulki.clip.features import Features
from mulki.functional import prototype_cross_entropy
from mulki.methods.base import Method, Needs, TaskStart, label_smoothing_option


class KeepLoRA(Method):
    """Cross-entropy on adapters whose input directions are fixed before each task."""

    name = "keeplora"
    summary = (
        "adapters that leave out what the model and earlier tasks depend on; wants --lora-rank"
    )
    options: Options

    @dataclass(frozen=True)
    class Options(Method.Options):
        label_smoothing: float = label_smoothing_option(0.0)
        energy_image: float = option(
            0.85, "share of the weights' energy that stays, of the image tower", low=0, high=1
        )
        energy_text: float = option(
            0.2, "share of the weights' energy that stays, of the text tower", low=0, high=1
        )
        energy_tasks: float = option(
            0.99, "share of the energy of earlier tasks' inputs that stays", low=0, high=1
        )
        layer_scale: float = option(
            1.0,
            "how much the first weights of a tower change, as a share of the last ones, to which "
            "it grows linearly",
            above=0,
            high=1,
        )

    def __init__(self, options: Options):
        super().__init__(options)
        self.needs = Needs(directions=True)
        # [in, k] by the name of the weight, on the CPU.
        self._of_tasks: dict[str, Tensor] = {}

    def get_extra_state(self) -> dict[str, Any]:
        """The directions of earlier tasks, for a run that is saved."""
        return {"of_tasks": self._of_tasks}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Set what `get_extra_state` returned."""
        self._of_tasks = dict(state["of_tasks"])

    def kept(self) -> dict[str, Tensor]:
        return self._of_tasks

    def take_kept(self, kept: Mapping[str, Tensor]) -> None:
        self._of_tasks = dict(kept)

    @torch.no_grad()
    def start_task(self, task: TaskStart) -> None:
        scales = layer_scales(list(task.adapted), self.options.layer_scale)
        for name, each in task.adapted.items():
            each.a.requires_grad_(False)
            if task.gradients is None:
                continue  # a task that goes on has its directions
            o = self.options
            energy = o.energy_image if name.startswith("visual.") else o.energy_text
            principal = leading_directions(each.start.float().mT @ each.start.float(), energy)
            of_tasks = self._of_tasks.get(name, principal[:, :0]).to(principal)
            held = torch.linalg.qr(torch.cat([principal, of_tasks], dim=1)).Q
            gradient = task.gradients[name].float()
            free = gradient - gradient @ held @ held.mT
            _, sizes, rows = torch.linalg.svd(free, full_matrices=False)
            # Directions of nothing but rounding are left out, or they would be another each time.
            smallest = max(gradient.shape) * torch.finfo(torch.float32).eps * gradient.norm()
            rows = torch.where(sizes[:, None] > smallest, rows, 0.0)
            each.a.copy_(scales[name] * rows[: len(each.a)])

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        return {
            "ce_loss": prototype_cross_entropy(
                student.image_text(), target, label_smoothing=self.options.label_smoothing
            )
        }

    @torch.no_grad()
    def keep_moments(self, moments: Mapping[str, Tensor]) -> None:
        for name, value in moments.items():
            before = self._of_tasks.get(name, value[:, :0]).to(value)
            rest = value - before @ (before.mT @ value)
            rest = rest - (rest @ before) @ before.mT
            held = 1 - float(rest.trace() / value.trace()) if value.any() else 1.0
            new = leading_directions(rest, self.options.energy_tasks, of=value, held=held)
            self._of_tasks[name] = torch.linalg.qr(torch.cat([before, new], dim=1)).Q.cpu()


def leading_directions(
    moments: Tensor, energy: float, *, of: Tensor | None = None, held: float = 0.0
) -> Tensor:
    """The fewest eigenvectors [in, k] that, with what is held already, hold a share of the energy.

    Args:
        moments: [in, in], symmetric and without negative eigenvalues.
        energy: the share of the trace that is wanted.
        of: whose trace it is; that of `moments` by default.
        held: the share that is held already.
    """
    values, vectors = torch.linalg.eigh(moments.double())
    shares = values.flip(0).clamp(min=0) / (moments if of is None else of).double().trace()
    missing = (held + shares.cumsum(0) < energy).sum()
    count = int(missing) + 1 if held < energy else 0
    return vectors.flip(1)[:, : min(count, int((shares > 0).sum()))].to(moments.dtype)


def layer_scales(names: list[str], first: float) -> dict[str, float]:
    """Scales of weights, growing linearly from `first` to 1 in each tower, in the order given."""
    scales = {}
    for image in (True, False):
        tower = [name for name in names if name.startswith("visual.") == image]
        for place, name in enumerate(tower):
            share = place / (len(tower) - 1) if len(tower) > 1 else 1.0
            scales[name] = first + (1 - first) * share
    return scales
