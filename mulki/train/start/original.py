"""The original model as a teacher: where it comes from, and where its features are kept."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mulki.choices.options import flag
from mulki.clip.models import VisionLanguageModel
from mulki.distributed.world import World
from mulki.errors import InputError
from mulki.methods import ZERO_SHOT, Method
from mulki.train.config.precision import Precision
from mulki.train.config.run_config import RunConfig
from mulki.train.learning.teacher_cache import TeacherCache
from mulki.train.start.start_model import load_start


def check_original(config: RunConfig, method: Method) -> None:
    """Raise an InputError for options of an original model that the run has no use for."""
    for name in ("original", "teacher_cache"):
        value = getattr(config, name)
        every = (*method.needs.teachers, *method.needs.without_classes().teachers)
        if value is not None and not (ZERO_SHOT in every or method.needs.prototypes):
            raise InputError(
                f"{flag(name)}: got {value}, but method {method.name} with these options has no "
                "original model as a teacher; leave it out, or change --method"
            )
    if config.original is None:
        if config.original_pretrained is not None:
            raise InputError(
                f"--original-pretrained: got {config.original_pretrained} without a model; pass "
                "--original too, as --model takes it"
            )
        return
    # Imported here, since a command line with a wrong option is answered without open_clip.
    from mulki.clip.models.open_clip_models import trained_one

    found = trained_one(config.original.replace("/", "-"))
    if found is not None and config.original_pretrained is None:
        raise InputError(
            f"--original: got {config.original} without weights, and random ones teach nothing; "
            f"pass --original-pretrained too, such as {found[1]} of {found[0]}"
        )


def cache_of_original(
    config: RunConfig, model: VisionLanguageModel, weights: str, precision: Precision, world: World
) -> TeacherCache | None:
    """Where features of the original model are kept; None where ``--teacher-cache`` names nothing.

    Args:
        config: options of the run.
        model: of its architecture.
        weights: hash of its weights.
        precision: how it computes.
        world: the processes that encode together.

    Raises:
        InputError: the folder cannot be made.
    """
    if config.teacher_cache is None:
        return None
    made_of = {
        "weights": weights,
        "architecture": json.dumps(_without_folders(model.config or model.name), sort_keys=True),
        "precision": f"{precision.name} {precision.dtype}, {precision.device.type}"
        + (", compiled" if config.torchcompile else ""),
        # In other batches, features are rounded otherwise.
        "batches": f"{config.batch_size_eval} images in each of {world.size} processes",
    }
    return TeacherCache(Path(config.teacher_cache), made_of, world, precision.device)


def _without_folders(value: Any) -> Any:
    # The same model may lie elsewhere.
    if isinstance(value, Mapping):
        return {name: _without_folders(each) for name, each in value.items()}
    return os.path.basename(value) if isinstance(value, str) else value


def load_original(
    config: RunConfig,
    student: VisionLanguageModel,
    device: torch.device | str,
    load: Callable[..., VisionLanguageModel] = load_start,
) -> VisionLanguageModel | None:
    """The model that ``--original`` names; None where it names none.

    Args:
        config: options of the run.
        student: with the start weights, without adapters.
        device: where it goes.
        load: takes what `load_start` takes.

    Raises:
        InputError: it cannot be loaded, is another architecture, or takes other images.
    """
    if config.original is None:
        return None
    try:
        original = load(config.original, config.original_pretrained, device=device)
    except InputError as error:
        text = str(error).replace("--pretrained", "--original-pretrained")
        raise InputError(text.replace("--model", "--original")) from None
    ours, theirs = student.clip.state_dict(), original.clip.state_dict()
    shapes = [{name: value.shape for name, value in each.items()} for each in (ours, theirs)]
    seen = [
        (m.image_size, tuple(m.clip.visual.image_mean), tuple(m.clip.visual.image_std))
        for m in (student, original)
    ]
    if shapes[0] != shapes[1] or seen[0] != seen[1]:
        what = "architecture" if shapes[0] != shapes[1] else "image size or normalisation"
        raise InputError(
            f"--original: {config.original} has another {what} than --model {config.model}; pass "
            "the model that this one was trained from"
        )
    # It may be said to resize them otherwise, but it is a teacher on the same pixels.
    original.preprocess = student.preprocess
    return original


def beside(
    config: RunConfig, original: VisionLanguageModel, student: VisionLanguageModel
) -> VisionLanguageModel:
    """The original model, frozen, as a teacher of the student.

    Args:
        config: options of the run.
        original: from `load_original`, with weights as they are stored.
        student: locked, or with adapters, as the run wants it.

    Raises:
        InputError: it differs from the student in a part of the text tower that the run freezes.
    """
    ours, theirs = student.clip.state_dict(), original.clip.state_dict()
    # Texts go through what is frozen once, for student and teachers alike.
    common = [name for name in student.frozen_text if name in theirs]
    different = [name for name in common if not torch.equal(ours[name], theirs[name])]
    if different:
        advice = ["leave --lock-text out"] if config.lock_text else []
        if student.adapters is not None:
            advice.append("choose --lora-targets in the text tower too")
        raise InputError(
            f"--original: {config.original} differs from --model {config.model} in "
            f"{different[0]}, which the run freezes for both; "
            f"{' and '.join(advice)}"
        )
    return original.frozen_beside(student)
