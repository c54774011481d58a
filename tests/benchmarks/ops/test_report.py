from __future__ import annotations

from mulki.bench.report import Quantiles, Result, markdown, rows_of
from tests.benchmarks.ops.bench_helpers import CASE, HEADER


def test_markdown_keeps_machines_apart() -> None:
    metrics = {"speed": Quantiles.same(2.0), "throughput": Quantiles.same(3.0)}
    result = Result(CASE, "eager", "both", "timed", metrics=metrics)
    rows = []
    for threads in ("1", "2"):
        machine = dict.fromkeys(HEADER[HEADER.index("gpu_name") : -2], "") | {"threads": threads}
        rows += list(rows_of(result, machine))
    text = markdown(rows)
    assert text.count("| operator |") == 2 and "threads: 1" in text and "threads: 2" in text
    assert text.count("| dual_teacher_kl | 7 x 5 x 16 | float32 | both | 2 |") == 2
    assert "*" not in text


def test_markdown_marks_a_backward_pass_that_had_its_gradients() -> None:
    metrics = {"speed": Quantiles.same(2.0)}
    result = Result(CASE, "mulki", "backward", "timed", metrics=metrics)
    machine = dict.fromkeys(HEADER[HEADER.index("gpu_name") : -2], "")
    text = markdown(list(rows_of(result, machine)))
    assert "| backward | 2* |" in text and "\n\\* gradients" in text
