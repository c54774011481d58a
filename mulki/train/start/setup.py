"""What is decided before the first step: checks, data, models, run folder."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mulki import methods
from mulki.choices.options import flag
from mulki.clip.models import VisionLanguageModel
from mulki.clip.tensor_files import CHECKSUM
from mulki.data import Task
from mulki.data.image_files import checks_reported
from mulki.data.made_images import MadeImages
from mulki.data.reference import ReferenceSet
from mulki.data.task import ImageSet
from mulki.data.transforms import train_transform
from mulki.data.vocabulary import Vocabulary
from mulki.distributed import launch
from mulki.distributed.world import World
from mulki.errors import InputError
from mulki.methods import Method
from mulki.ops import share_kernels
from mulki.runs import trackers
from mulki.runs.folder import RunFolder
from mulki.runs.new_folder import check_free
from mulki.train.config.precision import Precision, device_of
from mulki.train.config.run_config import CURRENT, MADE, RunConfig, Settings
from mulki.train.config.tasks import limit_reading, warn_of_equal_names
from mulki.train.learning.inputs import Training
from mulki.train.learning.validation import with_validation
from mulki.train.randomness import deterministic
from mulki.train.saving.description import Description, LearnedTask, recipe_of
from mulki.train.saving.recovery import (
    State,
    check_finite,
    check_same,
    open_to_resume,
    read_save,
)
from mulki.train.start.continuation import (
    Continuation,
    check_begin,
    check_merged,
    continuation,
    with_adapters,
)
from mulki.train.start.data import check_reference, check_unused, load_data, needs_beyond_tasks
from mulki.train.start.downloads import StandIns
from mulki.train.start.hashes import hashes_of, same_in_all
from mulki.train.start.original import beside, cache_of_original, check_original, load_original
from mulki.train.start.start_model import (
    check_start,
    load_start,
    warn_of_what_is_left_behind,
)


@dataclass(frozen=True, kw_only=True)
class Setup(Training):
    """A run that is ready to start.

    The model has the start weights, stored as `precision` wants them. One that will be sharded is
    still whole and on the CPU.

    Args:
        tasks, reference, vocabulary: see `mulki.train.start.data.Data`.
        original: the original model, where it is not the start model; stored likewise.
        earlier: how many of the tasks an earlier run has learned, the first ones.
        goes_on: from what, where there is such a run.
        hashes: of all that a result depends on, as `env.json` has them.
        folder: where the results go; None in all processes but the first, and where nothing is
            written.
        saved: the state that the run goes on from; None for a run from its start.
        rows: how many rows of results there are already.
    """

    tasks: Sequence[Task]
    reference: ReferenceSet | None
    vocabulary: Vocabulary | None
    original: VisionLanguageModel | None
    earlier: int = 0
    goes_on: Continuation | None = None
    hashes: Mapping[str, Any] = field(default_factory=dict)
    folder: RunFolder | None = None
    saved: State | None = None
    rows: int = 0

    def reference_of(self, task: Task) -> ReferenceSet | None:
        """The reference set while a task is learned, if the method needs one."""
        config = self.config
        images: ImageSet = task.train
        if config.reference == MADE:
            images = MadeImages(images, config.reference_changes, config.seed)
        elif config.reference != CURRENT:
            return self.reference
        return ReferenceSet.with_words(
            images, self.vocabulary if self.method.needs.captions else None
        )

    def description(self, learned: int, figures: Mapping[str, float]) -> Description:
        """What the model is after so many of the tasks, with its accuracy by test set."""
        return Description(
            tuple(
                LearnedTask(t.name, t.classes, t.templates, t.texts) for t in self.tasks[:learned]
            ),
            self._recipe,
            str(self.hashes.get("original", self.hashes["weights"])),
            figures,
            self.earlier,
            () if self.goes_on is None else self.goes_on.said.history,
        )

    @property
    def _recipe(self) -> dict[str, Any]:
        options = Settings(self.config, self.method.options).to_dict()
        return recipe_of(options | {"precision": self.precision.name})

    @property
    def learned_with(self) -> tuple[dict[str, Any], ...]:
        """Of each run that this one goes on from, its number of tasks and its other options."""
        own, earlier = self._recipe, () if self.goes_on is None else self.goes_on.said.history
        return tuple(
            {"tasks": count, "options": others}
            for count, recipe in earlier
            if (others := {k: v for k, v in recipe.items() if k not in own or own[k] != v})
        )

    @property
    def uses(self) -> tuple[str, ...]:
        """What the run uses beyond its tasks and the start model, in words."""
        return needs_beyond_tasks(self.config, self.method, self.tasks).uses


@contextlib.contextmanager
def prepared(
    settings: Settings,
    tasks: Sequence[Task] | None = None,
    resume: str | os.PathLike[str] | None = None,
    *,
    write: bool = True,
    stand_ins: StandIns | None = None,
    hold: Callable[[], None] = lambda: None,
    checked: Callable[[int, int], None] = lambda done, total: None,
) -> Iterator[Setup]:
    """Check everything that can be checked, then make the run folder, or open that of `resume`.

    The global generators of Python, NumPy and torch are seeded. The processes that torchrun
    started are joined while the context lasts.

    Args:
        settings: from `mulki.train.config.run_config.resolve`.
        tasks: learned instead of those that the settings name.
        resume: the folder of a run to go on with.
        write: make a run folder; without it nothing is written, after the same checks.
        stand_ins: take the place of data sets and models that are not on this machine. Without
            them these are errors, or downloaded.
        hold: lets signals wait, once another process has ended.
        checked: called with the number of images checked so far, and of all.

    Raises:
        InputError: bad tasks, model, device or options, or a folder that is taken.
        ProcessLost: another process of the run has ended.
    """
    config = settings.run
    _seed_everything(config.seed)  # for parameters of the method
    method = methods.get(config.method)(settings.method)
    precision = check_options(config, method)
    with (
        deterministic(config.deterministic),
        launch.join(precision.device, config.process_timeout, hold, config.fsdp) as world,
        contextlib.ExitStack() as at_end,
    ):
        if world.size > 1 and precision.device.type != "cpu":
            share_kernels()
        facts: dict[str, object] = {}
        problem = saved = folder = None
        try:
            if world.main:
                folder = _folder_to_resume(config, resume)
            if folder is not None:
                at_end.callback(folder.release)
            if resume is not None:
                saved = read_save(Path(resume), world)
            setup = _read(settings, method, precision, world, tasks, stand_ins, write, checked)
            if method.trains and resume is None and settings.run.continue_ is None:
                warn_of_what_is_left_behind(settings.run)
            facts = same_in_all(settings, setup.tasks, setup.hashes)
            facts["precision"] = precision.name
            if setup.goes_on is not None and saved is None and write:
                facts["files of --continue (hash)"] = setup.goes_on.fingerprint()[:12]
            if resume is not None:
                check_same(Path(resume), setup.hashes)
                facts["save (hash)"] = saved[CHECKSUM] if saved else "none"
        except InputError as error:
            problem = error
        world.agree(precision.device, problem, **facts)
        # Not earlier: random start weights are the same in all processes, while what encoders draw
        # during training differs.
        if world.rank:
            _seed_everything(config.seed + world.rank)
        if world.main and folder is None and write:
            folder = _make_folder(settings, setup)
            at_end.callback(folder.release)
        rows = world.total(0 if folder is None else folder.rows, device=precision.device)[0]
        yield replace(setup, folder=folder, saved=saved, rows=rows)


def _read(
    settings: Settings,
    method: Method,
    precision: Precision,
    world: World,
    tasks: Sequence[Task] | None,
    stand_ins: StandIns | None,
    write: bool,
    checked: Callable[[int, int], None],
) -> Setup:
    # Tasks and models, checked; arguments as of `prepared`.
    config = settings.run
    goes_on = None if config.continue_ is None else continuation(Path(config.continue_))
    learned = () if goes_on is None else goes_on.said.tasks
    with checks_reported(checked if world.main else lambda done, total: None):
        data = load_data(settings, method, world.size, tasks, stand_ins, learned)
    load = load_start if stand_ins is None else stand_ins.model
    # Last, since it can take minutes.
    model = _load_model(config, method, precision, world, load)
    original = load_original(config, model, model.device, load)
    warn_of_equal_names(data.tasks, model.tokenizer)
    hashes = hashes_of(data, model, original)
    if goes_on is not None and stand_ins is None:
        check_begin(goes_on.said, hashes)
        hashes["checkpoint"] = goes_on.checksum
    weights = hashes.get("original", hashes["weights"])
    _store_weights(config, precision, model, original)
    _adapt(config, method, model)
    if goes_on is not None and model.adapters is not None:
        goes_on = with_adapters(goes_on, model)
        if stand_ins is None:
            check_merged(model, goes_on)
    if original is not None:
        original = beside(config, original, model)
    new = with_validation(config, method, data.tasks[data.earlier :])
    data = data._replace(tasks=[*data.tasks[: data.earlier], *new])
    # Last, since it makes a folder.
    cache = cache_of_original(config, model, weights, precision, world) if write else None
    return Setup(
        config=config,
        method=method,
        model=model,
        transform=_training_transform(config, model),
        precision=precision,
        world=world,
        original=original,
        teacher_cache=cache,
        goes_on=goes_on,
        hashes=hashes,
        **data._asdict(),
    )


def check_options(config: RunConfig, method: Method) -> Precision:
    """Check what can be checked without data and model, and limit the pixels of images.

    Returns:
        How the encoders compute, and the device of this process.

    Raises:
        InputError: options that cannot be used, or not together.
    """
    device = device_of(config.device)
    # The cache would keep all sharded weights whole.
    precision = Precision(config.precision, device, cached=not config.fsdp)
    _check_sharding(config, method, precision)
    _check_adapters(config, method)
    check_reference(config, method)
    check_unused(config, method)
    check_start(config)
    _check_drift(config, method)
    _check_continuing(config, method)
    check_original(config, method)
    limit_reading(config)
    return precision


def _check_continuing(config: RunConfig, method: Method) -> None:
    if config.continue_ is None and config.test_tasks:
        raise InputError(
            f"--test-tasks: got {config.test_tasks[0]} without --continue, whose tasks it means; "
            "mulki eval tests other ones"
        )
    if config.continue_ is not None and not method.trains:
        raise InputError(
            f"--continue: method {method.name} learns nothing; mulki eval tests a model as it is"
        )


def _check_drift(config: RunConfig, method: Method) -> None:
    for name in ("head_shrinkage", "head_weight"):
        if not config.head and (value := getattr(config, name)) != getattr(RunConfig, name):
            raise InputError(f"{flag(name)}: got {value:g} beside --no-head; leave one of them out")
    for still, why in (
        (not config.head, "--no-head keeps no class means"),
        (not method.trains, f"method {method.name} learns nothing"),
        (config.lock_image, "features do not move with --lock-image"),
    ):
        if config.head_drift and still:
            raise InputError(f"--head-drift: got {config.head_drift}, but {why}; leave one out")


def _check_adapters(config: RunConfig, method: Method) -> None:
    if method.needs.directions and config.lora_rank is None:
        raise InputError(
            f"--method {method.name}: it learns adapters alone; pass their --lora-rank, such as 16"
        )
    if config.lora_rank is None:
        for name in ("lora_targets", "lora_alpha"):
            if value := getattr(config, name):
                shown = " ".join(value) if isinstance(value, tuple) else value
                raise InputError(
                    f"{flag(name)}: got {shown} without adapters; pass --lora-rank too, or leave "
                    "it out"
                )
        return
    for name, why in (
        ("lock_image", "adapters freeze all weights by themselves"),
        ("torchcompile", "each teacher and each task would compile the model again"),
    ):
        if getattr(config, name):
            raise InputError(f"{flag(name)}: {why}; leave it out, or --lora-rank")
    if not method.trains:
        raise InputError(
            f"--lora-rank: method {method.name} learns nothing; leave it out, or change --method"
        )
    if method.needs.fisher or method.takes_mean:
        what = "Fisher information of weights" if method.needs.fisher else "a mean of weights"
        raise InputError(
            f"--lora-rank: method {method.name} with these options takes {what}, which adapters "
            "do not have; leave it out, or change --method or these options"
        )


def _check_sharding(config: RunConfig, method: Method, precision: Precision) -> None:
    if config.opt == "muon" and config.fsdp:
        raise InputError("--opt muon: its steps need whole matrices; leave --fsdp out")
    if config.fsdp and (method.needs.fisher or method.needs.directions):
        raise InputError(
            f"--fsdp: method {method.name} needs whole gradients of weights; leave --fsdp out"
        )
    if config.fsdp and precision.name in ("bf16", "fp16") and config.lora_rank is None:
        raise InputError(
            f"--fsdp: with --precision {config.precision} a block has normalisations in float32 "
            f"beside other weights, and FSDP wants one dtype; pass pure_{config.precision} or "
            "amp_bf16"
        )
    if config.fsdp and not launch.launched():
        raise InputError(
            "--fsdp: this is the only process, nothing can be sharded; start several with torchrun "
            "--nproc-per-node N -m mulki run ..., or leave --fsdp out"
        )
    if config.fsdp and precision.scaler.is_enabled():
        raise InputError(
            "--fsdp: gradient scaling does not work on sharded gradients; pass --precision amp_bf16"
        )


def _folder_to_resume(config: RunConfig, resume: str | os.PathLike[str] | None) -> RunFolder | None:
    # A run that goes on does so without curves where the package is gone.
    trackers.chosen(config.report_to, installed=resume is None)
    if resume is not None:
        return open_to_resume(Path(resume), config)
    check_free(config.logs, config.name)
    return None


def _load_model(
    config: RunConfig,
    method: Method,
    precision: Precision,
    world: World,
    load: Callable[..., VisionLanguageModel],
) -> VisionLanguageModel:
    _seed_everything(config.seed)
    # A model that will be sharded may not fit on one device.
    device = "cpu" if config.fsdp and world.size > 1 else precision.device
    model = load(config.model, config.pretrained, device=device)
    model.lock(text=config.lock_text, image=config.lock_image)
    if method.trains and not model.trainable():
        raise InputError(
            "--lock-image, --lock-text: nothing is left to train; leave one of them out"
        )
    if config.grad_checkpointing:
        model.checkpoint_activations()
    return model


def _adapt(config: RunConfig, method: Method, model: VisionLanguageModel) -> None:
    if config.lora_rank is None:
        return
    fixed = method.needs.directions
    model.adapt(config.lora_rank, config.lora_targets, config.lora_alpha, fixed_a=fixed)
    if not model.trainable():
        raise InputError(
            f"--lora-rank: {config.model} has no weights that could have adapters; leave it out"
        )


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _store_weights(
    config: RunConfig,
    precision: Precision,
    model: VisionLanguageModel,
    original: VisionLanguageModel | None,
) -> None:
    named = {f"--model {config.model} --pretrained {config.pretrained}": model}
    if original is not None:
        named[f"--original {config.original}"] = original
    for name, each in named.items():
        precision.convert(each)
        advice = f"pass sound weights, or another --precision than {precision.name}"
        check_finite(each.clip.state_dict(), name, advice)


def _training_transform(config: RunConfig, model: VisionLanguageModel) -> Callable[..., Any]:
    visual: Any = model.clip.visual
    return train_transform(
        model.preprocess, config.augment, model.image_size, visual.image_mean, visual.image_std
    )


def _make_folder(settings: Settings, setup: Setup) -> RunFolder:
    config, precision = settings.run, setup.precision
    # Each of several processes has a device of its own; what they have in common is its kind.
    device = precision.device.type if setup.world.size > 1 else str(precision.device)
    return RunFolder.create(
        config.logs,
        config.name,
        method=config.method,
        order=config.order,
        seed=config.seed,
        columns=tuple(task.name for task in setup.tasks if len(task.test)),
        config=settings.to_dict() | {"precision": precision.name, "device": device},
        hashes=setup.hashes,
        uses=setup.uses,
        parameters=setup.model.parameter_counts()._asdict(),
        learned_before=tuple(task.name for task in setup.tasks[: setup.earlier]),
        learned_with=setup.learned_with,
    )
