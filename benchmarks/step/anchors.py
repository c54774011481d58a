"""Time and memory of the relation to text anchors, fused beside plain PyTorch.

    python -m benchmarks.step.anchors
    python -m benchmarks.step.anchors --output benchmarks/step/anchors.csv

The relation holds 64 images against the class texts and A anchors together, for two teachers, with
the gradient of the images (and of the texts, where they are the student's). Plain PyTorch stores
the logits of every model. Both are checked against each other first, then timed by turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.step.side_by_side import TIMES, side_by_side
from benchmarks.tables import Cell, machine_line, parser_with_output, show
from mulki.bench.cases import Inputs
from mulki.clip.features import Features
from mulki.stages.anchors import TextsOf, text_anchor_kl

TEMPERATURE = 2.0
COLUMNS = {
    "texts_of": "texts of",
    "images": "images",
    "anchors": "anchors",
    "width": "D",
    **TIMES,
}


@dataclass(frozen=True)
class Shape:
    """What is timed.

    Args:
        texts_of: whose texts the student's images are held against.
        images: in a batch.
        classes: of the task.
        anchors: texts beyond the classes.
        width: D.
    """

    texts_of: TextsOf
    images: int
    classes: int
    anchors: int
    width: int


def fused(shape: Shape, teachers: Sequence[Features], weights: Tensor) -> Callable[..., Tensor]:
    """`mulki.stages.anchors.text_anchor_kl`."""

    def loss(images: Tensor, anchored: Tensor) -> Tensor:
        student = Features(images, anchored[: shape.classes], 100.0, anchored=anchored)
        return text_anchor_kl(student, teachers, weights, anchor_texts=shape.texts_of)

    return loss


def plain(shape: Shape, teachers: Sequence[Features], weights: Tensor) -> Callable[..., Tensor]:
    """The same with stored logits and `F.kl_div`."""

    def loss(images: Tensor, anchored: Tensor) -> Tensor:
        total = images.new_zeros(())
        for k, teacher in enumerate(teachers):
            assert teacher.anchored is not None
            with torch.no_grad():
                p = F.softmax(100.0 * teacher.images @ teacher.anchored.T / TEMPERATURE, dim=1)
            columns = anchored if shape.texts_of == "student" else teacher.anchored
            log_q = F.log_softmax(100.0 * images @ columns.T / TEMPERATURE, dim=1)
            kl = F.kl_div(log_q, p, reduction="none").sum(dim=1)
            total = total + TEMPERATURE**2 * (weights[:, k] * kl).mean()
        return total

    return loss


def measure(shape: Shape, seconds: float, device: str) -> list[dict[str, Cell]]:
    """Rows of the table for one shape.

    Raises:
        AssertionError: the two ways differ.
    """
    generator = torch.Generator(device).manual_seed(0)

    def unit(rows: int) -> Tensor:
        x = torch.randn(rows, shape.width, generator=generator, device=device)
        return F.normalize(x, dim=1)

    def model() -> tuple[Tensor, Tensor]:
        return unit(shape.images), unit(shape.classes + shape.anchors)

    teachers = []
    for _ in range(2):
        images, anchored = model()
        teachers.append(Features(images, anchored[: shape.classes], 100.0, anchored=anchored))
    weights = torch.rand(shape.images, 2, generator=generator, device=device)
    weights = weights / weights.sum(dim=1, keepdim=True)
    arguments = model()
    names = ("images",) if shape.texts_of == "teacher" else ("images", "anchored")
    leaves = dict(zip(names, (x.requires_grad_() for x in arguments), strict=False))
    relation = Inputs(arguments, leaves, torch.ones((), device=device))
    ways = {make.__name__: make(shape, teachers, weights) for make in (fused, plain)}
    columns = {
        "texts_of": shape.texts_of,
        "images": shape.images,
        "anchors": shape.anchors,
        "width": shape.width,
    }
    return [columns | row for row in side_by_side(ways, relation, seconds, device)]


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
    rows = []
    texts: TextsOf
    for texts in ("teacher", "student"):
        for images in a.images:
            for anchors in a.anchors:
                shape = Shape(texts, images, 10, anchors, a.width)
                rows += measure(shape, a.seconds, a.device)
    show(rows, COLUMNS, a.output, a.device)


if __name__ == "__main__":
    main()
