from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mulki.ops import backends
from mulki.train import sequence
from mulki.train.display.outline import amounts, plan
from mulki.train.display.progress import STEPS, TEACHERS, TEST
from mulki.train.start.setup import Setup
from tests.train.run_helpers import Run


def of_run(run: Run, monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[list[str], Any]:
    seen: list[Setup] = []
    real = plan

    def spied(setup: Setup) -> list[str]:
        seen.append(setup)
        return real(setup)

    monkeypatch.setattr(sequence, "plan", spied)
    run(console=Console(quiet=True), **options)
    return real(seen[0]), amounts(seen[0])


def test_a_plan_says_what_is_done(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, work = of_run(run, monkeypatch, method="mulki", seed=3)
    assert [line[:8].strip() for line in lines] == [
        "run", "model", "device", "kernels", "steps", "uses", "memory", "results"
    ]  # fmt: skip
    text = {line[:8].strip(): line[9:] for line in lines}
    assert text["run"].startswith("mulki on 2 tasks of ") and text["run"].endswith("shades, seed 3")
    assert text["device"].startswith("cpu, ")
    assert text["device"].endswith(", precision fp32")
    assert text["steps"].startswith("2 x 4 of 6 images; ")
    assert text["uses"] == "999 words of ImageNet's class names"
    served = {one.backend for one in backends.report() if one.device_type == "cpu"}
    assert all(name in text["kernels"] for name in served)
    # Features are float32 in any precision.
    lines, _ = of_run(run, monkeypatch, method="zero_shot", precision="amp_bf16", name="b")
    assert f"kernels  {text['kernels']}" in lines
    assert text["memory"].endswith("GiB free") or text["memory"].endswith("MiB free")
    # Zero-shot and a row after each task, of 15 and 10 test images.
    assert work[STEPS] == 8 and work[TEST] == 75 and work[TEACHERS] > 0


def test_a_plan_without_training(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, work = of_run(run, monkeypatch, method="zero_shot")
    assert any(line.startswith("steps    none") for line in lines)
    # Of the training images there are class statistics.
    assert work == {TEACHERS: 30, TEST: 25}
    assert of_run(run, monkeypatch, method="zero_shot", name="b", head=False)[1][TEACHERS] == 0


def test_a_plan_names_a_vocabulary_of_ones_own(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("owl\nheron\n")
    options = {"method": "mulki", "anchors": "both", "vocabulary": str(words)}
    lines, _ = of_run(run, monkeypatch, **options)
    assert f"uses     class names of earlier tasks, 2 words of {words}" in lines
    lines, _ = of_run(run, monkeypatch, method="mulki", name="b", anchors="seen")
    assert "uses     class names of earlier tasks" in lines
    lines, _ = of_run(run, monkeypatch, method="finetune", name="c")
    assert not any(line.startswith("uses") for line in lines)


def test_steps_of_unequal_tasks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines, work = of_run(run, monkeypatch, method="finetune", epochs=1, micro_batch="2")
    (steps,) = (line for line in lines if line.startswith("steps"))
    assert ", 2 at a time;" in steps and work[TEACHERS] == 30
