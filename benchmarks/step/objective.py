"""Time of the loss part of a step: from features to their gradients, fused beside plain PyTorch.

    python -m benchmarks.step.objective
    python -m benchmarks.step.objective --output benchmarks/step/objective.csv

The objective is MulKI's without anchors: cross-entropy, alignment, four relations to two teachers
with the gate "label", and the distance of features. `benchmarks.step.anchors` has the relation to
anchors. Both ways are checked against each other first, then timed by turns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step import plain
from benchmarks.step.side_by_side import TIMES, side_by_side
from benchmarks.tables import Cell, machine_line, parser_with_output, show
from mulki.bench.cases import Inputs
from mulki.clip.features import Features
from mulki.methods.mulki import MulKI
from mulki.stages.objective import MulKILoss
from mulki.train.config.presets import RELATIONS

COLUMNS = {"images": "images", "classes": "classes", "width": "D", **TIMES}


def measure(
    images: int, classes: int, width: int, seconds: float, device: str
) -> list[dict[str, Cell]]:
    """Rows of the table for one shape.

    Raises:
        AssertionError: the two ways differ.
    """
    generator = torch.Generator(device).manual_seed(0)

    def unit(rows: int) -> Tensor:
        x = torch.randn(rows, width, generator=generator, device=device)
        return F.normalize(x, dim=1)

    scale = torch.tensor(100.0, device=device)
    teachers = [
        Features(unit(images), unit(classes), scale, prototypes=unit(classes)) for _ in range(2)
    ]
    prototypes = unit(classes)
    target = torch.randint(classes, (images,), generator=generator, device=device)
    options = MulKI.Options(**RELATIONS | {"image_anchor": 0.0, "gate": "label"})
    fused = MulKILoss(image_anchor=0.0, gate="label")

    def student(u: Tensor, w: Tensor) -> Features:
        return Features(u, w, scale, prototypes=prototypes)

    ways = {
        "fused": lambda u, w: fused(student(u, w), teachers, target),
        "plain": lambda u, w: plain.objective(student(u, w), teachers, None, target, options),
    }
    leaves = {"images": unit(images).requires_grad_(), "texts": unit(classes).requires_grad_()}
    inputs = Inputs(tuple(leaves.values()), leaves, torch.ones((), device=device))
    columns = {"images": images, "classes": classes, "width": width}
    return [columns | row for row in side_by_side(ways, inputs, seconds, device)]


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 26, 232])
    parser.add_argument("--width", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each way")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args(argv)
    print(machine_line(a.device), flush=True)
    shapes = [(n, c, d) for d in a.width for n in a.images for c in a.classes]
    rows = [row for shape in shapes for row in measure(*shape, a.seconds, a.device)]
    show(rows, COLUMNS, a.output, a.device)


if __name__ == "__main__":
    main()
