"""Small task folders and packs, made where a test needs them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mulki.data.shards import open_shard
from tests.data.data_helpers import encoded, picture, write_shard


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """Make DIR/{train,test}/<class>/N.png; the two splits may differ in classes."""

    def make(
        name: str = "birds",
        train: tuple[str, ...] = ("blue_jay", "crow"),
        test: tuple[str, ...] | None = None,
        count: int = 3,
    ) -> Path:
        seed = 0
        for split, classes in (("train", train), ("test", train if test is None else test)):
            (tmp_path / name / split).mkdir(parents=True)
            for label in classes:
                folder = tmp_path / name / split / label
                folder.mkdir()
                for i in range(count):
                    seed += 1
                    picture(seed).save(folder / f"{i}.png")
        return tmp_path / name

    return make


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A pack of two tasks, digits and letters, with 5 train and 3 test images each."""
    root = tmp_path / "pack"
    root.mkdir()
    tasks = {}
    for t, name in enumerate(("digits", "letters")):
        tasks[name] = {
            "classes": [f"{name} a", f"{name} b"],
            "templates": ["a drawing of {}."],
            **{
                split: write_shard(
                    root / f"{name}-{split}.tar",
                    [(encoded(picture(100 * t + 10 * n + i), "webp"), i % 2) for i in range(n)],
                )
                for split, n in (("train", 5), ("test", 3))
            },
        }
    orders = {"I": ["digits", "letters"], "II": ["letters", "digits"]}
    content = {"format": 1, "image_size": 16, "tasks": tasks, "orders": orders}
    (root / "tasks.json").write_text(json.dumps(content))
    return root


@pytest.fixture
def images(pack: Path) -> Any:
    return open_shard(pack / "digits-train.tar")
