"""The start model of a run: by its name, or from what another run has saved."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from mulki.clip import models
from mulki.clip.models import BUNDLED, VisionLanguageModel
from mulki.errors import InputError
from mulki.train.config.precision import Precision
from mulki.train.config.run_config import RunConfig
from mulki.train.saving.checkpoints import description_of, load_checkpoint
from mulki.train.saving.recovery import check_finite

_log = logging.getLogger(__name__)

_FOLDER = "local-dir:"  # before a path, in names of open_clip
_SCHEMAS = (_FOLDER, "hf-hub:")


def check_start(config: RunConfig) -> None:
    """Raise an InputError for a start model with random weights that were not asked for."""
    name = config.model.replace("/", "-")
    if config.pretrained is not None or config.model == BUNDLED or ":" in name:
        return
    import open_clip

    from mulki.clip.models.open_clip_models import trained_one

    if name in open_clip.list_models():
        trained = "pass a file of weights"
        if (found := trained_one(name)) is not None:
            other, tag = found
            same = other == name
            trained = f"pass {'a tag, such as' if same else f'--model {other} --pretrained'} {tag}"
        raise InputError(
            f"--pretrained: got none, so {config.model} would start from random weights; "
            f"{trained}, or --pretrained none if random ones are meant"
        )


def load_start(
    name: str, pretrained: str | None = None, *, device: torch.device | str = "cpu"
) -> VisionLanguageModel:
    """The model that ``--model`` names.

    Args:
        name: what `mulki.clip.models.load` takes, or what
            `mulki.train.saving.checkpoints.load_checkpoint` takes as a path: the folder of a run, a
            folder with a checkpoint, or a file of weights that says its model.
        pretrained: as of `mulki.clip.models.load`; only with a name.
        device: where it goes.

    Raises:
        InputError: as these two do, or weights beside a path.
    """
    if not is_checkpoint(name):
        return models.load(name, pretrained, device=device)
    if pretrained is not None:
        raise InputError(
            f"--pretrained: {name} brings its own weights; leave --pretrained {pretrained} out"
        )
    return load_checkpoint(Path(name), device=device)


def warn_of_what_is_left_behind(config: RunConfig) -> None:
    """Warn of a start model that has learned tasks: its run is not what goes on."""
    path = Path(config.model.removeprefix(_FOLDER))
    if config.original is not None or not (
        config.model.startswith(_FOLDER) or is_checkpoint(config.model)
    ):
        return
    try:
        said = description_of(path)
    except InputError:
        return  # what it says of itself is of no use to this run
    if said is not None and said.tasks:
        _log.warning(
            "--model: %s has learned %s; this run takes its weights, and neither its recipe nor "
            "its original model: pass --continue %s for all of it, or --original for that model",
            config.model,
            ", ".join(task.name for task in said.tasks),
            path,
        )


def as_in_its_run(model: VisionLanguageModel, where: str, config: RunConfig) -> None:
    """Prepare a saved model so that the same operations compute its features as in its run.

    Args:
        model: as loaded.
        where: what an error calls it.
        config: of the run.

    Raises:
        InputError: weights that are not finite.
    """
    model.lock(text=config.lock_text, image=config.lock_image)
    Precision(config.precision, model.device).convert(model)
    model.eval()
    check_finite(model.clip.state_dict(), where, "pass another checkpoint")


def is_checkpoint(name: str) -> bool:
    """Whether ``--model`` names a path. Names of models go before it; ``./NAME`` is a path."""
    if name.startswith(_SCHEMAS) or name == BUNDLED or not Path(name).exists():
        return False
    import open_clip

    return name.replace("/", "-") not in open_clip.list_models()
