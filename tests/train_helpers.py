"""Tiny models and tasks for the tests of training, the models, evaluation and the command line.

The models are real open_clip architectures, small enough that a run takes a fraction of a second.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from mulki.clip import models
from mulki.clip.models import VisionLanguageModel
from mulki.data import Task, folder_task, load_sequence

_TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
_VIT = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
_RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "tiny-vit": {"embed_dim": 32, "vision_cfg": _VIT, "text_cfg": _TEXT},
    "tiny-resnet": {"embed_dim": 16, "vision_cfg": _RESNET, "text_cfg": _TEXT},
    "tiny-biased": {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": _VIT,
        "text_cfg": _TEXT,
    },
}
# One for all models from the first tiny one on: to make one takes a fifth of a short run.
_tokenizer = cache(open_clip.SimpleTokenizer)
# What is said of the first picture of a kind, of the second, and so on.
TRAIN_TEXTS = ("a picture of", "a drawing of", "a picture of")
TEST_TEXTS = ("a picture of",)
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220)}
SHADES = {"dark": (30, 30, 30), "light": (225, 225, 225)}


def write_split(folder: Path, colours: dict[str, tuple[int, int, int]], count: int) -> None:
    """`count` noisy 32 x 32 pictures of each colour: easy to learn, none like another."""
    for target, (name, colour) in enumerate(colours.items()):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            random = np.random.default_rng([len(str(folder.name)), target, i])
            noise = random.normal(0, 40, (32, 32, 3))
            pixels = (np.array(colour) + noise).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def write_task(
    root: Path, colours: dict[str, tuple[int, int, int]], train: int = 6, test: int = 5
) -> Path:
    write_split(root / "train", colours, train)
    write_split(root / "test", colours, test)
    return root


def write_reference(root: Path, count: int = 4) -> Path:
    """`count` pictures of each of three colours, each with a caption of its own."""
    write_split(root, COLOURS, count)
    lines = [f"{c}/{i}.png,picture {i} of something {c}" for c in COLOURS for i in range(count)]
    (root / "captions.csv").write_text("path,caption\n" + "\n".join(lines) + "\n")
    return root


def write_pairs(root: Path, name: str = "flags", kinds: int = 6) -> Path:
    """`root/name.csv` of pictures of the bundled pack, half of whose captions are of two."""
    (task,) = load_sequence([f"embedded:{name}"])
    (root / name).mkdir(parents=True)
    lines = ["path,caption,split"]
    for split, texts in (("train", TRAIN_TEXTS), ("test", TEST_TEXTS)):
        images = getattr(task, split)
        for kind in range(kinds):
            places = [place for place, target in enumerate(images.targets) if target == kind]
            for place, text in zip(places, texts, strict=False):
                file = f"{name}/{split}-{kind}-{place}.png"
                images.load(place).save(root / file)
                lines.append(f'{file},"{text} {task.classes[kind]}",{split}')
    (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return root / f"{name}.csv"


def state_of(model: VisionLanguageModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers, copied."""
    return {name: value.detach().clone() for name, value in model.clip.state_dict().items()}


def same_state(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two state dicts agree bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(v, other[n]) for n, v in one.items())


def without_figures() -> AbstractContextManager[object]:
    """In the block runs draw nothing, which takes longer than they do; tests/report draws."""
    return mock.patch("mulki.report.html.plots", lambda contents: [])


class Calls:
    """What the encoders of each model were asked: numbers of images and of texts, call by call."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self._log: list[tuple[int, str, int]] = []
        for kind in ("images", "texts"):
            self._spy(patch, kind)

    def _spy(self, patch: pytest.MonkeyPatch, kind: str) -> None:
        real: Callable[..., torch.Tensor] = getattr(VisionLanguageModel, f"encode_{kind}")

        def counted(model: VisionLanguageModel, batch: torch.Tensor) -> torch.Tensor:
            self._log.append((id(model.clip), kind, len(batch)))
            return real(model, batch)

        patch.setattr(VisionLanguageModel, f"encode_{kind}", counted)

    def total(self) -> tuple[int, int]:
        """How many images and how many texts all models were asked for so far."""
        images, texts = (
            sum(n for _, k, n in self._log if k == kind) for kind in ("images", "texts")
        )
        return images, texts

    def of(self, model: VisionLanguageModel, kind: str) -> list[int]:
        """Batch sizes of the calls of one model; kind is "images" or "texts"."""
        return [n for clip, k, n in self._log if clip == id(model.clip) and k == kind]


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Registers the tiny architectures with open_clip and returns their names."""
    folder = tmp_path_factory.mktemp("architectures")
    for name, architecture in ARCHITECTURES.items():
        (folder / f"{name}.json").write_text(json.dumps(architecture))
    open_clip.add_model_config(folder)
    with mock.patch("open_clip.factory.SimpleTokenizer", _tokenizer):
        yield tuple(ARCHITECTURES)


@pytest.fixture
def load_tiny(tiny_models: Sequence[str]) -> Callable[..., VisionLanguageModel]:
    """Load a tiny architecture with the same random weights every time."""

    def load(name: str = "tiny-vit", seed: int = 0) -> VisionLanguageModel:
        torch.manual_seed(seed)
        model = models.load(name)
        model.lock()
        return model

    return load


@pytest.fixture(scope="session")
def start_model(
    tiny_models: Sequence[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """The tiny ViT with weights on disk, as `--model` takes it in this and in other processes."""
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    model = models.load("tiny-vit")
    from mulki.train.saving.checkpoints import publish, save_weights

    save_weights(model, folder / "weights.safetensors")
    publish(model, folder / "weights.safetensors", folder / "model")
    return {"model": f"local-dir:{folder / 'model'}"}


@pytest.fixture(scope="session")
def task_folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two task folders, colours (3 classes) and shades (2 classes)."""
    root = tmp_path_factory.mktemp("tasks")
    return str(write_task(root / "colours", COLOURS)), str(write_task(root / "shades", SHADES))


@pytest.fixture
def tasks(task_folders: tuple[str, str]) -> list[Task]:
    return [folder_task(folder) for folder in task_folders]
