from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mulki.app import listing
from mulki.app.cli import run_command
from mulki.app.commands import plan as command
from mulki.data.decoding import limit_pixels, pixel_limit
from mulki.train.card import Peak, Way
from mulki.train.config.run_config import RunConfig
from mulki.train.start import downloads
from mulki.train.start.downloads import Download, StandIns
from tests.train_helpers import COLOURS, write_split

Refused = Callable[[Sequence[object]], str]


@pytest.fixture
def words(
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> list[str]:
    monkeypatch.chdir(tmp_path)
    fixed = ["--device", "cpu", "--precision", "fp32", "--batch-size", "4", "--iterations", "9"]
    return ["plan", *task_folders, "--model", start_model["model"], *fixed]


def test_a_plan_is_printed_and_nothing_is_written(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([*words, "--name", "first"]) == 0
    out, said = capsys.readouterr()
    lines = out.splitlines()
    heads = [line[:8].strip() for line in lines if line[:1].isalpha() and line[8:9] == " "]
    for head in ("run", "model", "device", "kernels", "steps", "memory", "stored", "needs", "fits"):
        assert heads.count(head) == 1, head
    assert any(line.startswith("time") and "whole run" in line for line in lines)
    assert all(len(line) <= 80 for line in lines if line.startswith(("needs", "fits")))
    assert lines[-1].startswith("before: until its first step") and len(lines[-1]) <= 80
    rows = {
        line.split()[0]: line.split()[1:5] for line in lines if line[:7] in ("colours", "shades ")
    }
    assert rows == {"colours": ["3", "18", "15", "9"], "shades": ["2", "12", "10", "9"]}
    assert "measuring task 2 of 2, shades" in said
    assert not list(tmp_path.iterdir())


def test_a_plan_as_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*words, "--json", "--method", "zero_shot"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["method"], found["downloads"], found["stored"]) == ("zero_shot", [], 0)
    assert found["parameters"] > found["trainable"] > 0
    assert [each["name"] for each in found["tasks"]] == ["colours", "shades"]


Missing = dict[str, tuple[str | None, list[Download]]]


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Missing:
    """What is missing of models by name; nothing of others."""
    found: Missing = {}
    for module in (command, downloads):
        monkeypatch.setattr(module, "not_here", lambda name, tag: found.get(name, (name, [])))
    return found


def test_weights_that_would_be_downloaded_are_named_and_not_loaded(
    words: list[str], capsys: pytest.CaptureFixture[str], known: Missing
) -> None:
    known["tiny-vit"] = ("tiny-vit", [Download("weights", "owner/weights")])
    words[words.index("--model") + 1] = "tiny-vit"
    words += ["--pretrained", "best", "--method", "zero_shot"]
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert "download weights owner/weights, about" in out and "random weights" in out
    assert "in all" not in out
    assert run_command([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    (download,) = found["downloads"]
    size = {"bytes": 4 * found["parameters"], "estimated": True, "by_hand": False}
    assert download == {"what": "weights", "from": "owner/weights", **size}


def test_an_original_that_is_not_here_costs_what_the_start_model_costs(
    words: list[str], capsys: pytest.CaptureFixture[str], known: Missing
) -> None:
    words += ["--method", "mulki", "--lock-text", "--original", "tiny-vit"]
    words += ["--original-pretrained", "best", "--json"]
    for architecture in ("tiny-vit", None):
        missing = [Download("weights", "owner/original"), Download("tokenizer", "owner/words")]
        known["tiny-vit"] = (architecture, missing)
        assert run_command(words) == 0
        found = json.loads(capsys.readouterr().out)
        assert [(each["from"], each["bytes"]) for each in found["downloads"]] == [
            ("owner/original", 4 * found["parameters"]),
            ("owner/words", None),
        ]
        assert found["seconds"] > 0
    known["tiny-vit"] = ("tiny-resnet", missing)
    assert run_command(words) == 2
    assert "has another architecture than --model" in capsys.readouterr().err


def test_of_a_model_that_only_a_hub_knows_the_tasks_are_planned(
    words: list[str], capsys: pytest.CaptureFixture[str], known: Missing
) -> None:
    known["hf-hub:a/b"] = (None, [Download("weights", "a/b")])
    words[words.index("--model") + 1] = "hf-hub:a/b"
    assert run_command(words) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = [line[:8].strip() for line in lines if line[:1].isalpha() and line[8:9] == " "]
    assert heads[:4] == ["run", "model", "steps", "download"]
    assert not any("stand in" in line for line in lines)
    assert any(line.startswith("model    hf-hub:a/b, whose memory") for line in lines)
    assert any(line.startswith("steps    2 x 9 of 4 images;") for line in lines)
    assert "download weights a/b, of unknown size" in lines
    rows = [line.split() for line in lines if line[:7] in ("colours", "shades ")]
    assert rows == [["colours", "3", "18", "15", "9"], ["shades", "2", "12", "10", "9"]]
    assert run_command([*words, "--method", "zero_shot", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["parameters"], found["seconds"]) == (None, None)
    assert [each["steps"] for each in found["tasks"]] == [0, 0]
    assert found["downloads"][0]["bytes"] is None
    assert run_command([*words, "--method", "snd", "--reference", "none"]) == 2
    assert "--reference" in capsys.readouterr().err


@pytest.fixture
def of_hub(words: list[str], known: Missing) -> list[str]:
    """A plan with a model that only a hub knows."""
    known["hf-hub:a/b"] = (None, [Download("weights", "a/b")])
    words[words.index("--model") + 1] = "hf-hub:a/b"
    return words


def test_without_its_model_a_plan_refuses_what_a_run_does(
    of_hub: list[str], refused: Refused, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = pixel_limit()
    try:
        assert "more than 10" in refused([*of_hub, "--max-pixels", "10"])
    finally:
        limit_pixels(before)
    assert "--device: cuda:77" in refused([*of_hub, "--device", "cuda:77"])
    assert "--opt muon" in refused([*of_hub, "--fsdp", "--opt", "muon"])
    assert "--fsdp: this is the only process" in refused([*of_hub, "--fsdp"])
    finetune = [*of_hub, "--method", "finetune"]
    assert "--original: got ViT-B-32" in refused([*finetune, "--original", "ViT-B-32"])
    assert "--anchors-per-step: got 5" in refused([*finetune, "--anchors-per-step", "5"])
    assert "--report-to: got 'paper'" in refused([*of_hub, "--report-to", "paper"])
    assert "nowhere" in refused([*of_hub, "--method", "snd", "--reference", "nowhere"])
    taken = ["--logs", finished.parent, "--name", finished.name]
    assert "exists and is not empty" in refused([*of_hub, *taken])
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert "WORLD_SIZE: got 'x'" in refused(of_hub)


def test_names_in_brackets_are_printed_as_they_are(
    of_hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "old[red]", COLOURS, 5)
    assert run_command([*of_hub, str(tmp_path / "old[red]"), "--test-fraction", "0.4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["old[red]", "3", "9", "6", "9"] in rows


def test_each_printed_command_gets_the_data_sets_of_one_sequence(
    of_hub: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    of_hub[1:3] = ["mtil:eurosat", "xtail:food", "mtil:dtd"]
    of_hub += ["--protocol", "coop", "--data-root", "my [bold] :food: data"]
    monkeypatch.setenv("COLUMNS", "40")
    assert run_command(of_hub) == 0
    lines = [shlex.split(x) for x in capsys.readouterr().out.splitlines() if "mulki tasks" in x]
    options = ["--prepare", "--data-root", "my [bold] :food: data", "--protocol", "coop"]
    assert lines == [
        ["mulki", "tasks", "mtil:eurosat", "mtil:dtd", *options],
        ["mulki", "tasks", "xtail:food", *options],
    ]
    monkeypatch.setattr(listing, "prepare", lambda *_: iter(()))
    for line in lines:
        assert run_command(line[1:]) == 0


def test_data_sets_that_would_be_downloaded_are_named_with_their_size(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words[1:3] = ["mtil:dtd", words[1], "mtil:stanfordcars"]
    words += ["--data-root", str(tmp_path / "data"), "--batch-size-eval", "8"]
    words += ["--method", "finetune"]
    assert run_command(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "download data set dtd, 596 MiB" in out
    assert "download data set stanfordcars, 1866 MiB, by hand" in out
    assert "2463 MiB in all" in out
    assert "mulki tasks mtil:dtd mtil:stanfordcars --prepare --data-root" in out
    for row in ("dtd 47 1880 1880 9", "colours 3 18 15 9", " 196 8144 8041 9"):
        assert row in out
    assert not list(tmp_path.iterdir())


def test_a_batch_that_does_not_fit_is_told(
    words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mulki.train.learning.memory.free_memory", lambda device: 0)
    words += ["--method", "finetune"]
    assert run_command(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    said = "fits 1 image at a time in half of the free memory, but a step has 4: pass --micro-batch"
    assert f"{said} auto" in out
    assert run_command([*words, "--micro-batch", "1"]) == 0
    (fits,) = (x for x in capsys.readouterr().out.splitlines() if x.startswith("fits"))
    assert "--micro-batch" not in fits


def test_what_a_run_refuses_a_plan_refuses(
    words: list[str], refused: Refused, tmp_path: Path, finished: Path
) -> None:
    assert "--seeds" in refused([*words, "--seeds", "0", "1"])
    assert "--resume" in refused(["plan", "--resume", finished])
    taken = ["--logs", finished.parent, "--name", finished.name]
    assert "exists and is not empty" in refused([*words, *taken])
    assert "no such option" in refused([*words, "--no-such-option", "1"])
    words[1] = str(tmp_path / "nothing")
    assert "nothing" in refused(words)


def test_a_plan_of_a_card(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command([*words, "--method", "finetune", "--card-gb", "1"]) == 0
    out = capsys.readouterr().out
    assert "card     1 GB: the run fits, all 4 images of a step at a time" in out
    assert "time     " not in out and out.count("--lora-rank 16") == 2
    assert run_command([*words, "--method", "finetune", "--card-gb", "0.02", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["card_gb"] == 0.02 and said["batch_size"] == 4 and len(said["ways"]) == 4
    figures = {"options", "models", "optimizer", "stored", "kept", "peaks", "whole", "evaluation"}
    way = said["ways"][0]
    assert figures | {"images"} == {*way} and way["images"] == 4


def test_a_plan_of_a_card_where_nothing_of_an_image_trains(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The image tower is locked: its features have no gradient."""
    given = [*words, "--method", "finetune", "--lock-image", "--card-gb", "1"]
    assert run_command(given) == 0
    assert "card     1 GB: the run fits" in capsys.readouterr().out


def test_what_fits_a_card_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    all_weights, adapters = (
        Way(options, models, 0, 0, (Peak(0, 0),), (Peak(0, 100),), (Peak(0, 200),), 0)
        for options, models in (("", 10_000), ("--lora-rank 16", 1000))
    )
    for size, said in (
        (30_000, "all 64 images of a step at a time"),
        (20_000, "with --micro-batch 63 or less"),
        (12_000, "with --micro-batch 8 or less"),
        (9000, "it fits with --lora-rank 16"),
        (1000, "a smaller --batch-size or --batch-size-eval"),
    ):
        ways = [all_weights, adapters]
        command._show_ways(ways, size / 1e9, [], RunConfig(), 64, StandIns(), as_json=False)
        assert said in " ".join(capsys.readouterr().out.split())


def test_a_card_that_is_too_small(
    words: list[str],
    refused: Refused,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = Way("", 10_000, 0, 0, (Peak(0, 0),), (Peak(0, 10**6),), (Peak(0, 10**6),), 10**6)
    monkeypatch.setattr(command, "ways", lambda setup: iter([large]))
    assert run_command([*words, "--method", "finetune", "--card-gb", "0.0001"]) == 0
    assert "card     0.0001 GB: too small; a smaller model" in capsys.readouterr().out
    for wrong in ("0", "-1", "nan", "inf", "much"):
        assert f"--card-gb: got '{wrong}', wanted" in refused([*words, "--card-gb", wrong])
    assert "takes no step" in refused([*words, "--method", "zero_shot", "--card-gb", "8"])
    words[words.index("--model") + 1] = "hf-hub:nobody/nothing"
    assert "known once it was downloaded" in refused([*words, "--card-gb", "8"])


def test_a_plan_of_a_task_without_a_split(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path / "whole", COLOURS, 5)
    given = ["plan", str(tmp_path / "whole"), *words[3:]]
    assert run_command(given) == 2
    assert "or pass --test-fraction 0.2 if these are classes" in capsys.readouterr().err
    assert run_command([*given, "--test-fraction", "0.4"]) == 0
    rows = [line.split()[:5] for line in capsys.readouterr().out.splitlines()]
    assert ["whole", "3", "9", "6", "9"] in rows
