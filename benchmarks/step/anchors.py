"""Time and memory of the relation to text anchors, fused beside plain PyTorch.

    python -m benchmarks.step.anchors
    python -m benchmarks.step.anchors --output benchmarks/step/anchors.csv

The relation holds 64 images against the class texts and A anchors together, for two teachers, with
the gradient of the images (and of the texts, where they are the student's). Plain PyTorch stores
the logits of every model. Both are checked against each other first, then timed by turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step.side_by_side import TIMES, side_by_side
from benchmarks.tables import Cell, machine_line, parser_with_output, show
from mulki.bench.cases import Inputs
from mulki.clip.features import Features
from mulki.stages.anchors import TextsOf, text_anchor_kl

CLASSES, SCALE, TEMPERATURE = 10, 100.0, 2.0
TEXTS_OF: tuple[TextsOf, ...] = ("teacher", "student")
COLUMNS = {
    "texts_of": "texts of",
    "images": "images",
    "anchors": "anchors",
    "width": "D",
    **TIMES,
}


def measure(
    texts_of: TextsOf, images: int, anchors: int, width: int, seconds: float, device: str
) -> list[dict[str, Cell]]:
    """Rows of the table for one shape.

    Args:
        texts_of: whose texts the student's images are held against.

    Raises:
        AssertionError: the two ways differ.
    """
    generator = torch.Generator(device).manual_seed(0)

    def unit(rows: int) -> Tensor:
        x = torch.randn(rows, width, generator=generator, device=device)
        return F.normalize(x, dim=1)

    def model(u: Tensor, anchored: Tensor) -> Features:
        return Features(u, anchored[:CLASSES], SCALE, anchored=anchored)

    teachers = [model(unit(images), unit(CLASSES + anchors)) for _ in range(2)]
    weights = torch.rand(images, 2, generator=generator, device=device)
    weights = weights / weights.sum(dim=1, keepdim=True)

    def fused(u: Tensor, anchored: Tensor) -> Tensor:
        return text_anchor_kl(model(u, anchored), teachers, weights, anchor_texts=texts_of)

    def plain(u: Tensor, anchored: Tensor) -> Tensor:
        total = u.new_zeros(())
        for k, teacher in enumerate(teachers):
            assert teacher.anchored is not None
            with torch.no_grad():
                p = F.softmax(SCALE * teacher.images @ teacher.anchored.T / TEMPERATURE, dim=1)
            columns = anchored if texts_of == "student" else teacher.anchored
            log_q = F.log_softmax(SCALE * u @ columns.T / TEMPERATURE, dim=1)
            kl = F.kl_div(log_q, p, reduction="none").sum(dim=1)
            total = total + TEMPERATURE**2 * (weights[:, k] * kl).mean()
        return total

    arguments = unit(images), unit(CLASSES + anchors)
    names = ("images",) if texts_of == "teacher" else ("images", "anchored")
    leaves = dict(zip(names, (x.requires_grad_() for x in arguments), strict=False))
    relation = Inputs(arguments, leaves, torch.ones((), device=device))
    shape = {"texts_of": texts_of, "images": images, "anchors": anchors, "width": width}
    ways = {"fused": fused, "plain": plain}
    return [shape | row for row in side_by_side(ways, relation, seconds, device)]


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[64])
    parser.add_argument("--anchors", type=int, nargs="+", default=[1000, 21_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=3.0, help="of timing for each way")
    parser.add_argument("--device", default="cpu")
    a = parser.parse_args(argv)
    print(machine_line(a.device), flush=True)
    shapes = product(TEXTS_OF, a.images, a.anchors)
    rows = [row for shape in shapes for row in measure(*shape, a.width, a.seconds, a.device)]
    show(rows, COLUMNS, a.output, a.device)


if __name__ == "__main__":
    main()
