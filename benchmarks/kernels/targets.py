"""The targets of the Triton kernels, and whether the plan meets them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Row = dict[str, Any]
SLOWER = 5  # per cent that a model of times can tell


class Target(NamedTuple):
    what: str
    found: float
    limit: float
    unit: str

    @property
    def verdict(self) -> str:
        if self.found <= self.limit:
            return "met"
        return f"missed by {100 * (self.found / self.limit - 1):.0f} %"


def targets(rows: Sequence[Row]) -> Iterator[Target]:
    """Of the loss of two teachers: counts of all widths and formats, times of bfloat16."""
    losses = [row for row in rows if row["operator"] == "dual_teacher_kl"]
    for most, limit, of in ((16384, 5.3, "up to P = 16384"), (65536, 8.3, "beyond")):
        least = 1 if most == 16384 else 16385
        found = max(r["products"] for r in losses if least <= r["p"] <= most and r["n"] >= 256)
        yield Target(f"products of a step, {of}", found, limit, "")
    for (n, p), limit in {(64, 100): 4, (256, 1000): 8, (16384, 16384): 400}.items():
        found = max(row["launches"] for row in _of(losses, n, p))
        yield Target(f"launches of a step at {n} x {p}", found, limit, "")
    (large,) = _of(losses, 8192, 8192, d=512, numbers="bf16")
    times = large["seconds"]["H100"]
    ours, at = times["mulki graph"], "at 8192 x 8192 x 512"
    yield Target(f"time {at}, of five products", 1e6 * ours, 2e6 * times["library"], "us")
    yield Target(f"time {at}, of half of eager's", 1e6 * ours, 5e5 * times["eager"], "us")
    yield Target(f"time {at}, of compile's", 1e6 * ours, 1e6 * times["compile"], "us")
    extra, stored = large["extra_bytes"] / 2**20, large["compile_extra_bytes"] / 2**20
    yield Target(f"extra memory {at}", extra, 64, "MiB")
    yield Target(f"extra memory {at}, of a tenth of compile's", extra, stored / 10, "MiB")
    (small,) = _of(losses, 64, 100, d=512, numbers="bf16")
    yield Target("a whole step at 64 x 100, Python's part", small["host_us"], 120, "us")
    for n, p, d in ((64, 100, 512), (4096, 1000, 768)):
        (row,) = _of(losses, n, p, d=d, numbers="bf16")
        times = row["seconds"]["H100"]
        for other in ("eager graph", "compile"):
            what = f"time at {n} x {p} x {d} in a graph, of {other.split()[0]}'s"
            yield Target(what, 1e6 * times["mulki graph"], 1e6 * times[other], "us")


def _of(rows: Sequence[Row], n: int, p: int, **where: Any) -> list[Row]:
    where |= {"n": n, "p": p}
    return [row for row in rows if all(row[name] == value for name, value in where.items())]


def slower(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each operator: in how many of its shapes ours is slower than compile."""
    for operator in dict.fromkeys(row["operator"] for row in rows):
        times = [
            row["seconds"]["H100"]
            for row in rows
            if row["operator"] == operator and row["numbers"] == "bf16"
        ]
        found = sum(one["mulki graph"] > (1 + SLOWER / 100) * one["compile"] for one in times)
        yield f"- {operator}: {found} of {len(times)} shapes"


def lines(rows: Sequence[Row]) -> Iterator[str]:
    yield "| target (two teachers, a step) | found | limit | |"
    yield "| --- | ---: | ---: | --- |"
    for one in targets(rows):
        found, limit = (f"{number:.4g} {one.unit}".rstrip() for number in (one.found, one.limit))
        yield f"| {one.what} | {found} | {limit} | {one.verdict} |"
