from __future__ import annotations

from dataclasses import replace

from mulki.bench.report import (
    LEGEND,
    REFERENCES,
    Quantiles,
    Result,
    markdown,
    rows_of,
    summary,
    terminal_table,
)
from tests.bench.bench_helpers import CASE, HEADER


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


def test_the_summary_is_of_several_cases() -> None:
    def result(operator: str, n: int, mode: str, ratio: float | None, provider: str) -> Result:
        metrics = {} if ratio is None else {"speedup_over_eager": Quantiles.same(ratio)}
        case = replace(CASE, operator=operator, n=n)
        return Result(case, provider, mode, "timed", metrics=metrics)

    results = [result("siglip", n, "both", n / 2, "mulki") for n in (2, 4, 9)]
    results += [result("siglip", 2, "both", 77.0, "compile")]
    results += [result("similarity", 2, "forward", 1.5, "mulki")]
    results += [result("similarity", 2, "backward", None, "mulki")]
    title, *lines = summary(results)
    assert title.startswith("\neager's time over mulki's")
    assert [line.split() for line in lines] == [
        ["forward", "both"], ["siglip", "-", "2.00"], ["similarity", "1.50", "-"]
    ]  # fmt: skip
    assert len({len(line) for line in lines}) == 1
    assert summary(results[:1]) == [] and summary([]) == []


def test_the_legend_names_every_column() -> None:
    assert all(f"{name}:" in LEGEND for name in ("products", "mm, copy", "MiB", "error", "device"))


def test_a_table_fits_80_columns() -> None:
    def metrics(*more: str) -> dict[str, Quantiles]:
        shares = ("share_of_torch_mm", "share_of_copy")
        found = {name: Quantiles.same(12.345) for name in (*more, "throughput", "memory")}
        found |= {name: Quantiles.same(1.0) for name in shares}
        error = {"gradient_error": Quantiles.same(1.5e-7)}
        return found | error | {"speed": Quantiles(0.01234, 0.01, 0.015)}

    on_cpu = metrics("speedup_over_eager", "speedup_over_compile")
    names = ("eager", "mulki-reference")
    lines = terminal_table(
        [Result(CASE, n, m, "timed", metrics=on_cpu) for m in ("forward", "both") for n in names]
    )
    assert len(lines) == 1 + 2 * 3 and max(map(len, lines)) <= 80
    assert [line.split()[0] for line in lines[1:]] == ["forward", *names, "both", *names]
    assert lines[2].split()[1:4] == ["0.0123", "20%", "12.35"] and lines[0].split()[2] == "eager"
    on_gpu = metrics(*(f"speedup_over_{name}" for name in REFERENCES), "device_time")
    lines = terminal_table([Result(CASE, names[1], "both", "timed", metrics=on_gpu)])
    assert len(lines) == 2 * 3 and max(map(len, lines)) <= 80
    assert "device" in lines[3] and lines[5].startswith("  mulki-reference")
    assert terminal_table([Result(CASE, "eager", "both", "failed")]) == []
