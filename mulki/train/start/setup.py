"""What is decided before the first step: checks, tasks, model, device, precision, run folder."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mulki import methods
from mulki.clip import models
from mulki.clip.models import VisionLanguageModel
from mulki.clip.tensor_files import CHECKSUM
from mulki.data import CaptionTask, Task
from mulki.data.decoding import limit_pixels
from mulki.data.image_files import told_of_checks
from mulki.data.reference import ReferenceSet, read_reference
from mulki.data.transforms import train_transform
from mulki.data.vocabulary import Vocabulary, imagenet_vocabulary, read_vocabulary
from mulki.distributed import launch
from mulki.distributed.world import World
from mulki.errors import InputError
from mulki.methods import VOCABULARY, Method, Needs
from mulki.runs import trackers
from mulki.runs.folder import RunFolder
from mulki.runs.new_folder import check_free
from mulki.train.config.precision import Precision
from mulki.train.config.run_config import CURRENT, RunConfig, Settings
from mulki.train.config.tasks import (
    check_captions,
    check_options_of_classes,
    load_tasks,
    warn_of_twins,
)
from mulki.train.learning import muon
from mulki.train.learning.batches import Transform
from mulki.train.saving.randomness import deterministic
from mulki.train.saving.recovery import (
    State,
    check_finite,
    check_same,
    open_to_resume,
    read_save,
)
from mulki.train.start.downloads import Absent
from mulki.train.start.original import check_original, load_original

# Options that may differ between the processes of a run, for example on different machines.
_PER_PROCESS = (
    "tasks",
    "data_root",
    "model",
    "pretrained",
    "original",
    "original_pretrained",
    "reference",
    "vocabulary",
    "workers",
    "device",
    "logs",
    "name",
    "log_every_n_steps",
    "report_to",
    "import",
)


@dataclass(frozen=True)
class Setup:
    """A run that is ready to start.

    Args:
        config: options of the run.
        method: what is trained.
        tasks: in the order in which they are learned.
        reference: images and captions for the method; None without need, or where each task's own
            images are the reference.
        vocabulary: words for the method, as text anchors or as captions of each task's own images;
            None without need.
        model: the student with the start weights, stored as `precision` wants them. A model that
            will be sharded is still whole and on the CPU.
        original: the original model, where it is not the start model; stored likewise.
        transform: of the training images.
        precision: how the encoders compute, and the device of this process.
        world: the processes of the run.
        folder: where the results go; None in all processes but the first, and where nothing is
            written.
        saved: the state that the run goes on from; None for a run from its start.
        rows: how many rows of results there are already.
    """

    config: RunConfig
    method: Method
    tasks: Sequence[Task]
    reference: ReferenceSet | None
    vocabulary: Vocabulary | None
    model: VisionLanguageModel
    original: VisionLanguageModel | None
    transform: Transform
    precision: Precision
    world: World
    folder: RunFolder | None
    saved: State | None = None
    rows: int = 0

    def reference_of(self, task: Task) -> ReferenceSet | None:
        """The reference set while a task is learned, if the method needs one."""
        if self.config.reference == CURRENT:
            return ReferenceSet.of_task(
                task, self.vocabulary if self.method.needs.captions else None
            )
        return self.reference

    @property
    def uses(self) -> tuple[str, ...]:
        """What the run uses beyond its tasks and the start model, in words."""
        return _beyond_tasks(self.config, self.method, self.tasks).uses


@contextlib.contextmanager
def prepared(
    settings: Settings,
    tasks: Sequence[Task] | None = None,
    resume: str | os.PathLike[str] | None = None,
    *,
    write: bool = True,
    absent: Absent | None = None,
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
        absent: makes what stands in for data sets and models that are not on this machine. Without
            it these are errors, or downloaded.
        hold: lets signals wait, once another process has ended.
        checked: told how many images were checked so far, and of how many.

    Raises:
        InputError: bad tasks, model, device or options, or a folder that is taken.
        ProcessLost: another process of the run has ended.
    """
    config = settings.run
    method = methods.get(config.method)(settings.method)
    precision = check_options(config, method)
    with (
        deterministic(config.deterministic),
        launch.join(precision.device, config.process_timeout, hold) as world,
        contextlib.ExitStack() as at_end,
    ):
        facts: dict[str, object] = {}
        problem = saved = folder = None
        try:
            if world.main:
                # A run that goes on does so without curves where the package is gone.
                trackers.chosen(config.report_to, installed=resume is None)
            if resume is not None:
                if world.main:
                    folder = open_to_resume(Path(resume), config)
                    at_end.callback(folder.release)
                saved = read_save(Path(resume), world)
            elif world.main:
                check_free(config.logs, config.name)
            with told_of_checks(checked if world.main else lambda done, total: None):
                tasks, reference, vocabulary = load_data(
                    settings, method, world.size, tasks, absent
                )
            # Last, since it can take minutes.
            load = models.load if absent is None else absent.model
            model = _load_model(config, method, precision, world, load)
            original = load_original(config, model, model.device, load)
            warn_of_twins(tasks, model.tokenizer)
            hashes = hashes_of(tasks, model, reference, vocabulary, original)
            for each, named in (
                (model, f"--model {config.model} --pretrained {config.pretrained}"),
                (original, f"--original {config.original}"),
            ):
                if each is not None:
                    precision.convert(each)
                    advice = f"pass sound weights, or another --precision than {precision.name}"
                    check_finite(each.clip.state_dict(), named, advice)
            transform = _training_transform(config, model)
            facts = {**_facts(settings, tasks, hashes), "precision": precision.name}
            if resume is not None:
                check_same(Path(resume), hashes)
                facts["save (hash)"] = saved[CHECKSUM] if saved else "none"
        except InputError as error:
            problem = error
        world.agree(precision.device, problem, **facts)
        assert tasks is not None
        # Not earlier: random start weights are the same in all processes, while what encoders draw
        # during training differs.
        if world.rank:
            _seed_everything(config.seed + world.rank)
        if world.main and folder is None and write:
            uses = _beyond_tasks(config, method, tasks).uses
            folder = _make_folder(settings, tasks, hashes, uses, precision, world)
            at_end.callback(folder.release)
        yield Setup(
            config,
            method,
            tasks,
            reference,
            vocabulary,
            model,
            original,
            transform,
            precision,
            world,
            folder,
            saved,
            world.total(0 if folder is None else folder.rows, device=precision.device)[0],
        )


def check_options(config: RunConfig, method: Method) -> Precision:
    """Check what can be checked without data and model, and limit the pixels of images.

    Args:
        config: options of the run.
        method: what is trained.

    Returns:
        How the encoders compute, and the device of this process.

    Raises:
        InputError: options that cannot be used, or not together.
    """
    precision = Precision(config.precision, device_of(config.device))
    _check_sharding(config, precision)
    check_reference(config, method)
    _check_anchors(config, method)
    check_original(config, method)
    limit_pixels(config.max_pixels)
    return precision


def load_data(
    settings: Settings,
    method: Method,
    processes: int,
    tasks: Sequence[Task] | None = None,
    absent: Absent | None = None,
) -> tuple[Sequence[Task], ReferenceSet | None, Vocabulary | None]:
    """The tasks, the reference set and the vocabulary of a run, checked.

    Args:
        settings: from `mulki.train.config.run_config.resolve`.
        method: what is trained.
        processes: of the run.
        tasks: learned instead of those that the settings name.
        absent: as of `prepared`.

    Raises:
        InputError: they cannot be read, or do not fit the options.
    """
    config = settings.run
    if tasks is None:
        tasks = load_tasks(config, None if absent is None else absent.data_set)
    reference = _load_reference(config, method)
    check_captions(tasks, type(method), config.batch_size, processes)
    check_options_of_classes(settings, tasks)
    return tasks, reference, _load_vocabulary(config, method, tasks)


def device_of(name: str) -> torch.device:
    """The device of this process.

    Args:
        name: as the option `--device` takes it.

    Raises:
        InputError: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Only this process's own GPU is tried: a context on the first GPU for each process would
        # fill the memory of that one.
        device = launch.device_of_process(torch.device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"--device: {name} cannot be used ({reason}); try auto or cpu") from None
    return device


def _check_sharding(config: RunConfig, precision: Precision) -> None:
    if config.opt == "muon":
        muon.check_available()
        if config.fsdp:
            raise InputError("--opt muon: its steps need whole matrices; leave --fsdp out")
    if config.fsdp and not launch.launched():
        raise InputError(
            "--fsdp: this is the only process, nothing can be sharded; start several with torchrun "
            "--nproc-per-node N -m mulki run ..., or leave --fsdp out"
        )
    if config.fsdp and precision.scaler.is_enabled():
        raise InputError(
            "--fsdp: gradient scaling does not work on sharded gradients; pass --precision amp_bf16"
        )


def check_reference(config: RunConfig, method: Method) -> None:
    """Raise an InputError where a method lacks its reference set, or has no use for one."""
    if method.needs.reference and config.reference is None:
        needed, folder = "images with captions", "a folder with captions.csv"
        if not method.needs.captions:
            needed, folder = "reference images", "a folder of images"
        raise InputError(
            f"--reference: method {method.name} distils on {needed} and got none; pass {folder}, a "
            f"CSV with the columns path and caption, or {CURRENT}"
        )
    if not method.needs.reference:
        for name, value in (
            ("reference", config.reference),
            ("reference-batch-size", config.reference_batch_size),
        ):
            if value is not None:
                raise InputError(
                    f"--{name}: got {value}, but method {method.name} uses no reference set; leave "
                    f"it out, or change --method"
                )


def _beyond_tasks(config: RunConfig, method: Method, tasks: Sequence[Task] = ()) -> Needs:
    # The needs of a method. The task's own images are no reference set, but their captions are
    # words of the vocabulary. Some needs are those of tasks with classes alone.
    needs = method.needs
    if tasks and all(isinstance(task, CaptionTask) for task in tasks):
        needs = needs.without_classes()
    if not (needs.reference and config.reference == CURRENT):
        return needs
    words = {VOCABULARY} if needs.captions else set()
    return replace(needs, reference=False, anchors=tuple({*needs.anchors, *words}))


def _check_anchors(config: RunConfig, method: Method) -> None:
    vocabulary = VOCABULARY in _beyond_tasks(config, method).anchors
    for name, value, used in (
        ("vocabulary", config.vocabulary, vocabulary),
        ("anchors-per-step", config.anchors_per_step, bool(method.needs.anchors)),
    ):
        if value is not None and not used:
            raise InputError(
                f"--{name}: got {value}, but method {method.name} with these options uses no such "
                "text anchors; leave it out, or change --anchors or --method"
            )


def _load_vocabulary(config: RunConfig, method: Method, tasks: Sequence[Task]) -> Vocabulary | None:
    if VOCABULARY not in _beyond_tasks(config, method, tasks).anchors:
        return None
    if config.vocabulary is None:
        return imagenet_vocabulary()
    return read_vocabulary(config.vocabulary)


def _load_reference(config: RunConfig, method: Method) -> ReferenceSet | None:
    if config.reference is None or config.reference == CURRENT:
        return None
    return read_reference(
        config.reference,
        captions=method.needs.captions,
        skip_bad_images=config.skip_bad_images,
    )


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


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _training_transform(config: RunConfig, model: VisionLanguageModel) -> Transform:
    visual: Any = model.clip.visual
    return train_transform(
        model.preprocess, config.augment, model.image_size, visual.image_mean, visual.image_std
    )


def hashes_of(
    tasks: Sequence[Task],
    model: VisionLanguageModel,
    reference: ReferenceSet | None = None,
    vocabulary: Vocabulary | None = None,
    original: VisionLanguageModel | None = None,
) -> dict[str, Any]:
    """Hashes of all that a result depends on, as `env.json` of a run folder has them."""
    hashes: dict[str, Any] = {
        "weights": _hash_of_weights(model),
        "tasks": {t.name: t.fingerprint() for t in tasks},
        **parts_of(tasks),
    }
    for name, used in (("reference", reference), ("vocabulary", vocabulary)):
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
        "prompts": {t.name: t.prompts_fingerprint() for t in tasks},
        "splits": {t.name: t.splits_fingerprint() for t in tasks},
    }


def _facts(
    settings: Settings, tasks: Sequence[Task], hashes: Mapping[str, Any]
) -> dict[str, object]:
    # What has to be the same in all processes, short enough for a message.
    options = {k: v for k, v in settings.to_dict().items() if k not in _PER_PROCESS}
    prints = list(hashes["tasks"].values())
    return {
        "torch": torch.__version__,
        "options (hash)": _hash(options),
        "tasks": f"{len(tasks)} tasks with {sum(len(t.train) for t in tasks)} training and "
        f"{sum(len(t.test) for t in tasks)} test images, hash {_hash(prints)}",
        "reference set (hash)": hashes.get("reference", settings.run.reference or "none")[:12],
        "vocabulary (hash)": hashes.get("vocabulary", "none")[:12],
        "start weights (hash)": hashes["weights"][:12],
        "original weights (hash)": hashes.get("original", "none")[:12],
    }


def _hash(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def _make_folder(
    settings: Settings,
    tasks: Sequence[Task],
    hashes: Mapping[str, Any],
    uses: tuple[str, ...],
    precision: Precision,
    world: World,
) -> RunFolder:
    config = settings.run
    # Each of several processes has a device of its own; what they have in common is its kind.
    device = precision.device.type if world.size > 1 else str(precision.device)
    return RunFolder.create(
        config.logs,
        config.name,
        method=config.method,
        order=config.order,
        seed=config.seed,
        columns=tuple(task.name for task in tasks),
        config=settings.to_dict() | {"precision": precision.name, "device": device},
        hashes=hashes,
        uses=uses,
    )
