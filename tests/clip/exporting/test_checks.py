from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mulki.clip.exporting.checks import export_folder, largest_difference, need_packages
from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError


def test_packages_that_are_missing_are_all_named() -> None:
    need_packages("--to x", "torch")
    with pytest.raises(InputError, match=r"--to x: needs nowhere1, nowhere2, .*mulki\[export\]"):
        need_packages("--to x", "torch", "nowhere1", "nowhere2")


def test_a_folder_appears_whole_or_not(tmp_path: Path) -> None:
    with export_folder(tmp_path / "a") as new:
        (new / "file").write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a" / "file").read_text() == "x"
    with pytest.raises(ZeroDivisionError), export_folder(tmp_path / "b") as new:
        (new / "file").write_text("x")
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    for taken in (tmp_path / "a", tmp_path / "a" / "file"):
        with pytest.raises(InputError, match=taken.name), export_folder(taken):
            pass
    below_a_file = tmp_path / "a" / "file" / "new"
    with (
        pytest.raises(InputError, match="new: cannot be made .*choose another place"),
        export_folder(below_a_file),
    ):
        pass
    with pytest.raises(PermissionError), export_folder(tmp_path / "b"):
        raise PermissionError("of the block")


@pytest.mark.parametrize("wrong", ["images", "one image", "texts"])
def test_features_that_differ_are_refused(
    load_tiny: Callable[..., VisionLanguageModel], wrong: str
) -> None:
    model = load_tiny()

    def images(pixels: Tensor) -> Tensor:
        off = wrong == "images" or (wrong == "one image" and len(pixels) == 1)
        return model.encode_images(pixels) + (2e-4 if off else 2e-5)

    def texts(tokens: Tensor) -> Tensor:
        return model.encode_texts(tokens) + (torch.nan if wrong == "texts" else 0)

    with pytest.raises(InputError, match=f"features of {wrong} "):
        largest_difference(model, images, texts)
    wrong = ""
    assert largest_difference(model, images, texts) == pytest.approx(2e-5, rel=0.1)
