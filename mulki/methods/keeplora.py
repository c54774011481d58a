"""keeplora: adapters that move weights only where neither the model nor earlier tasks look.

    L = CE(s u w^T, y)
    W' = W + K + alpha / r  B A             W [out, in], A [r, in] fixed, B [out, r] learned
    A  = first r right singular vectors of  G (I - M M^T)
    M  = [P, T]                             [in, k], orthonormal

G is the mean gradient of the cross-entropy over the task's training images at its start. P are the
first right singular vectors of the start model's W that hold `energy_image` (or `energy_text`) of
the sum of its squared singular values: what the model knows. T are directions of the inputs of W in
earlier tasks: after each task the fewest are added with which P and T hold `energy_tasks` of the
squared length of its inputs. With `layer_scale` g below 1, the change of the l-th of a tower's L
weights counts g + (1 - g) l / (L - 1) times.

Source: KeepLoRA (ICLR 2026), and for `layer_scale` KeepLoRA++. What differs from their code:

- P and T are directions of inputs, as the paper has it; the code takes the other side of W for P.
- The query, key and value of `nn.MultiheadAttention` are one weight with one adapter of rank r.
- B begins at zero. Theirs begins at S V^T of the projected gradient, with that product taken off W:
  the same function and the same steps, but for weight decay.
- Inputs are summed over all batches. Theirs are averaged by their place over batches.
- Layers are counted as weights, of which a transformer's layer has several.
- Directions in which the gradient is but rounding are left out.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mulki.choices.options import option
from mulki.methods.base import ClassLoss, Needs, TaskStart

# Of two directions at right angles, rounding makes less of each other.
_OVERLAP = 1e-3

_log = logging.getLogger(__name__)


class KeepLoRA(ClassLoss):
    """Cross-entropy on adapters whose input directions are fixed before each task."""

    name = "keeplora"
    summary = (
        "adapters that leave out what the model and earlier tasks depend on; wants --lora-rank"
    )
    options: Options
    needs = Needs(directions=True)

    @dataclass(frozen=True)
    class Options(ClassLoss.Options):
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
        # [in, k] by the name of the weight: T, and [P, T] of the present task.
        self._of_tasks: dict[str, Tensor] = {}
        self._held: dict[str, Tensor] = {}

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
        o, without = self.options, []
        scales = layer_scales(list(task.adapted), o.layer_scale)
        for name, each in task.adapted.items():
            weight = each.original.float()
            energy = o.energy_image if name.startswith("visual.") else o.energy_text
            of_tasks = self._of_tasks.get(name, weight.new_zeros(weight.shape[1], 0)).to(weight)
            principal = principal_directions(weight, energy)
            overlap = principal.mT @ of_tasks
            if overlap.numel() and overlap.abs().max() > _OVERLAP:
                # Kept by an earlier run, which held fewer directions of the weight.
                rest = of_tasks - principal @ overlap
                basis, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
                of_tasks = basis[:, sizes > _OVERLAP]
            held = torch.cat([principal, of_tasks], dim=1)
            self._of_tasks[name], self._held[name] = of_tasks, held
            if task.gradients is None:
                continue  # a task that goes on has its A
            gradient = task.gradients[name]
            _, sizes, rows = torch.linalg.svd(
                gradient - gradient @ held @ held.mT, full_matrices=False
            )
            # Of rounding alone, they would be other ones each time.
            eps = torch.finfo(gradient.dtype).eps
            free = sizes > max(gradient.shape) * eps * gradient.norm()
            each.a.copy_((scales[name] * free[:, None] * rows)[: len(each.a)])
            if not free.any():
                without.append(name)
        if without:
            _log.warning(
                "no direction is left in which %d of %d weights may change, such as %s; a lower "
                "--energy-image, --energy-text or --energy-tasks leaves some",
                len(without),
                len(task.adapted),
                without[0],
            )

    @torch.no_grad()
    def keep_moments(self, moments: Mapping[str, Tensor]) -> None:
        for name, value in moments.items():
            new = missing_directions(value, self._held[name], self.options.energy_tasks)
            # Those of a save are on the CPU.
            self._of_tasks[name] = torch.cat([self._of_tasks[name].to(new), new], dim=1)

    def end_task(self) -> None:
        self._held = {}


def principal_directions(weight: Tensor, energy: float) -> Tensor:
    """The fewest right singular vectors [in, k] that hold a share of the squared singular values.

    Args:
        weight: [out, in].
        energy: the share, in [0, 1].
    """
    _, values, rows = torch.linalg.svd(weight, full_matrices=False)
    squares = values.double().square()
    return rows[: _fewest(squares, energy * float(squares.sum()))].mT


def missing_directions(moments: Tensor, held: Tensor, energy: float) -> Tensor:
    """The fewest directions [in, n], beside those held, with which a share of inputs is held.

    Args:
        moments: [in, in], the sum of ``x x^T`` over inputs x.
        held: [in, k], orthonormal.
        energy: the share of the trace of `moments`, in [0, 1].
    """
    whole, basis = moments.double(), held.double()
    rest = whole - basis @ (basis.mT @ whole)
    rest = rest - (rest @ basis) @ basis.mT
    values, vectors = torch.linalg.eigh(rest)
    values = values.flip(0).clamp(min=0)
    trace = float(whole.trace())
    # A sum of products in float32 is rounded by less.
    values[values <= 4 * torch.finfo(torch.float32).eps * trace] = 0
    wanted = energy * trace - (trace - float(rest.trace()))
    return vectors.flip(1)[:, : _fewest(values, wanted)].to(held.dtype)


def _fewest(values: Tensor, wanted: float) -> int:
    # How many of these, which fall, have a sum of so much; at most those above zero.
    if wanted <= 0:
        return 0
    # On the CPU, since a GPU has no deterministic sum of this kind.
    missing = int((values.cpu().cumsum(0) < wanted * (1 - 1e-12)).sum())
    return min(missing + 1, int((values > 0).sum()))


def layer_scales(names: list[str], first: float) -> dict[str, float]:
    """Scales of weights, growing linearly from `first` to 1 in each tower, in the order given."""
    scales = {}
    for image in (True, False):
        tower = [name for name in names if name.startswith("visual.") == image]
        for place, name in enumerate(tower):
            share = place / (len(tower) - 1) if len(tower) > 1 else 1.0
            scales[name] = first + (1 - first) * share
    return scales
