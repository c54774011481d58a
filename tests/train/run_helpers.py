"""Short runs of tiny models, and what they leave in their folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from mulki import methods
from mulki.runs.folder import RunFolder

Run = Callable[..., RunFolder]


SHORT = {
    "iterations": 4,
    "batch_size": 6,
    "lr": 1e-3,
    "precision": "fp32",
    "device": "cpu",
    "log_every_n_steps": 2,
}


def options_of(method: str) -> dict[str, str]:
    """What a run of the method has to name, for its default options."""
    cls = methods.get(method)
    return {"reference": "current"} if cls(cls.Options()).needs.reference else {}


def weights(folder: RunFolder | Path, pattern: str = "task_02*") -> dict[str, torch.Tensor]:
    path = folder.path if isinstance(folder, RunFolder) else folder
    (file,) = (path / "checkpoints").glob(f"{pattern}.safetensors")
    return load_file(file)
