"""Hashes of all that a result depends on, and what the processes of a run have to agree on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mulki.clip.models import VisionLanguageModel
from mulki.data import Task
from mulki.train.config.run_config import Settings
from mulki.train.start.data import Data

# Options that may differ between the processes of a run, for example on different machines.
_PER_PROCESS = (
    *("tasks", "data_root", "model", "pretrained", "original", "original_pretrained", "reference"),
    *("vocabulary", "workers", "device", "logs", "name", "log_every_n_steps", "report_to"),
    *("teacher_cache", "import"),
)


def hashes_of(
    data: Data, model: VisionLanguageModel, original: VisionLanguageModel | None = None
) -> dict[str, Any]:
    """Hashes of all that a result depends on, as `env.json` of a run folder has them."""
    hashes: dict[str, Any] = {
        "weights": _hash_of_weights(model),
        "tasks": {task.name: task.fingerprint() for task in data.tasks},
        **parts_of(data.tasks),
    }
    for name, used in (("reference", data.reference), ("vocabulary", data.vocabulary)):
        if used is not None:
            hashes[name] = used.fingerprint()
    if original is not None:
        hashes["original"] = _hash_of_weights(original)
    return hashes


def _hash_of_weights(model: VisionLanguageModel) -> str:
    weights = hashlib.sha256()
    for name, value in sorted(model.checkpoint().items()):
        weights.update(name.encode())
        weights.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return weights.hexdigest()


def parts_of(tasks: Sequence[Task]) -> dict[str, dict[str, str]]:
    """Hashes of the parts of tasks, so that two runs can tell what differs."""
    return {
        "prompts": {task.name: task.prompts_fingerprint() for task in tasks},
        "splits": {task.name: task.splits_fingerprint() for task in tasks},
        "tests": {task.name: task.test.fingerprint() for task in tasks},
    }


def same_in_all(
    settings: Settings, tasks: Sequence[Task], hashes: Mapping[str, Any]
) -> dict[str, object]:
    """What has to be the same in all processes of a run, short enough for a message."""
    options = {k: v for k, v in settings.to_dict().items() if k not in _PER_PROCESS}
    return {
        "torch": torch.__version__,
        "options (hash)": _hash(options),
        "tasks": f"{len(tasks)} tasks with {sum(len(t.train) for t in tasks)} training and "
        f"{sum(len(t.test) for t in tasks)} test images, hash {_hash([*hashes['tasks'].values()])}",
        "reference set (hash)": hashes.get("reference", settings.run.reference or "none")[:12],
        "vocabulary (hash)": hashes.get("vocabulary", "none")[:12],
        "start weights (hash)": hashes["weights"][:12],
        "original weights (hash)": hashes.get("original", "none")[:12],
    }


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]
