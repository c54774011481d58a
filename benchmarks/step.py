"""What a training step costs, and what surrounds it.

    python -m benchmarks.step               # beside the same step as code of the ZSCL family has it
    python -m benchmarks.step large         # the memory of large models, measured and counted
    python -m benchmarks.step growth        # the start of a task, as its images grow in number
    python -m benchmarks.step neighbour     # training beside another process that computes

`step` (with none named): same model, batch and objective, in one process, step by step in turns;
the losses of the first step have to agree. Options for it:

    --model ViT-B-16 --task letters --batch-size 8 --lock-text --rounds 3

`large`: each line is a process of its own, with random weights: MulKI with its two teachers, as it
is by default, takes two steps of images of the bundled pack, in micro-batches. The memory of the
process is compared with what `mulki plan --card-gb` counts. Of the two largest models steps of 16
images are measured in place of 64, which take four times as long. Batches that would take hours on
a CPU, and models that do not fit into this machine's memory, are counted alone. What a card holds
is the largest micro-batch on it; memory is little changed by other programs.

`growth`: PNG files in class folders, and members of one tar shard (half of them images, half their
classes), are written into a temporary folder, and read and checked as `mulki run` does. Each is
read in a process of its own that has read a small one before.

`neighbour`: a training step has many short parallel parts. At the end of each, GCC's OpenMP lets
threads that have nothing left to do spin GOMP_SPINCOUNT times before they sleep. With a core for
each thread that is fast; where another process takes a core, the spinning thread keeps the working
one from it. Each setting trains in a process of its own, alone and beside a process that counts.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks.tables import Cell, Row, machine_line, markdown, parser_with_output, show, write_csv
from mulki.bench.call_cost import PeakMemory, no_garbage_collection
from mulki.clip import models
from mulki.clip.features import Features
from mulki.clip.models import BUNDLED, VisionLanguageModel
from mulki.clip.prototypes import Prototypes, class_means
from mulki.data import folder_task, load_sequence
from mulki.data.loader import batches, cycle
from mulki.data.shard_tasks import shard_task
from mulki.data.subset import Subset, limited, sampled
from mulki.data.task import Task
from mulki.data.transforms import train_transform
from mulki.errors import InputError, nearest
from mulki.methods import PREVIOUS, ZERO_SHOT
from mulki.methods.mulki import MulKI
from mulki.stages.connecting import RunningMean
from mulki.stages.distinguishing import class_weights
from mulki.train.config.precision import Precision
from mulki.train.config.presets import RELATIONS
from mulki.train.config.run_config import RunConfig, resolve
from mulki.train.learning.inputs import Listeners, StepReport, TaskInputs, Training
from mulki.train.learning.learn import learn_task

MIB = 2**20
# Relative difference of the losses of the first step: they differ in the order of sums in fp32, and
# in half precision in what is rounded too.
TOLERANCE = {"fp32": 1e-4}
TOLERANCE_HALF = 2e-2


# --- A step beside one that asks the teachers anew


@dataclass(frozen=True, eq=False)
class Job:
    """What both loops compute.

    Args:
        config, options: of `mulki run` and of its method `mulki`, every relation switched on.
        start: the model both students start from, its locked parts frozen.
        teachers: the original model and the one after the previous task; two models, as from the
            second task on.
        task: of the bundled pack, with few images.
        transform: of the training images.
    """

    config: RunConfig
    options: MulKI.Options
    start: VisionLanguageModel
    teachers: tuple[VisionLanguageModel, VisionLanguageModel]
    task: Task
    transform: Callable[..., Tensor]

    @property
    def warm_up(self) -> int:
        """Steps before the timed ones: an epoch, so that what is kept is kept, and two at least."""
        return max(2, len(self.task.train) // self.config.batch_size)

    def columns(self) -> dict[str, Cell]:
        """What tells it from other jobs."""
        c = self.config
        return {
            "model": c.model,
            "task": self.task.name,
            "classes": len(self.task.classes),
            "batch_size": c.batch_size,
            "precision": c.precision,
            "lock_text": c.lock_text,
            "augment": c.augment,
            "train_images": len(self.task.train),
        }

    def precision(self) -> Precision:
        """Anew, since a gradient scaler belongs to one loop."""
        return Precision(self.config.precision, self.start.device)

    def student(self) -> VisionLanguageModel:
        """Beside the start model, so that no loss of the first step is 0; it trains the same."""
        trains = set(self.start.trainable())
        copy = _moved(self.start, 0.99)
        for name, parameter in copy.clip.named_parameters():
            parameter.requires_grad_(name in trains)
        copy.split = None
        return copy


def prepare(task: str, rounds: int, **given: Any) -> Job:
    """Load everything.

    Args:
        task: of the bundled pack.
        rounds: steps that are timed.
        given: further options of `mulki run`; None leaves one as it is by default.

    Raises:
        InputError: naming the option.
    """
    given = {name: value for name, value in given.items() if value is not None}
    # Plain loops of this family have no anchors; they distil on the task's images, with a gate and
    # a running mean.
    given |= {"method": "mulki", "lr_scheduler": "const", "anchors": "none"}
    given |= RELATIONS | {"gate": "label", "we_every": 10, "l2": 0.0}
    settings = resolve(given)
    config = settings.run
    tasks = {t.name: t for t in load_sequence(("embedded",), "I")}
    if task not in tasks:
        raise InputError(
            f"--task: got {task!r}{nearest(task, tasks)}, wanted one of {', '.join(tasks)}"
        )
    torch.manual_seed(0)
    device = torch.device(config.device)
    start = models.load(config.model, config.pretrained, device=device)
    start.lock(text=config.lock_text)
    Precision(config.precision, device).convert(start)
    visual: Any = start.clip.visual
    assert isinstance(settings.method, MulKI.Options)
    job = Job(
        config,
        settings.method,
        start,
        (start.frozen_copy(), _moved(start, 1.01)),
        limited(tasks[task], config.limit_images or config.batch_size),
        train_transform(
            start.preprocess, config.augment, start.image_size, visual.image_mean, visual.image_std
        ),
    )
    return replace(job, config=replace(config, iterations=job.warm_up + rounds))


@torch.no_grad()
def _moved(start: VisionLanguageModel, factor: float) -> VisionLanguageModel:
    # Another model than the original, so that both have to be asked.
    own = start.trainable()
    copy = start.frozen_copy()
    for name, parameter in copy.clip.named_parameters():
        if name in own:
            parameter.mul_(factor)
    return copy


def learn(job: Job, listen: Callable[[StepReport, float], None]) -> None:
    """Learn the task as the second of a sequence, by the function that `mulki run` calls.

    Args:
        listen: called after every step with its seconds; its own time belongs to no step. The
            first step's are those of all that is done once a task, too.
    """
    begun = _now(job.start.device)

    def stepped(report: StepReport) -> None:
        nonlocal begun
        listen(report, _now(job.start.device) - begun)
        begun = _now(job.start.device)

    training = Training(
        config=job.config,
        method=MulKI(job.options),
        model=job.student(),
        transform=job.transform,
        precision=job.precision(),
    )
    frozen = dict(zip((ZERO_SHOT, PREVIOUS), job.teachers, strict=True))
    learn_task(training, TaskInputs(1, job.task, frozen), Listeners(stepped))


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class PlainLoop:
    """The same step as code of the ZSCL family writes it, a step at a time.

    Both teachers and their class texts are encoded anew at every step; so are the student's class
    texts, from the tokens on. Images are decoded anew too. Logits are stored in full, the
    divergence is `F.kl_div`, AdamW is torch's default, tensors lie in the default layout.

    Args:
        job: of whose start model and teachers this makes copies.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self._precision = job.precision()
        self._student = job.student()
        self._teachers = [teacher.frozen_copy() for teacher in job.teachers]
        for model in (self._student, *self._teachers):
            model.clip.to(memory_format=torch.contiguous_format)
        prompts = [of_class[0] for of_class in job.task.prompts()]
        self._tokens = self._student.tokenizer(prompts).to(job.start.device)
        self._prototypes = [self._class_means(teacher) for teacher in self._teachers]
        self._own_prototypes = Prototypes(
            self._prototypes[0], momentum=job.options.prototype_momentum
        )
        config = job.config
        self._weights = self._student.trainable()
        self._optimizer = torch.optim.AdamW(
            self._weights.values(),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            weight_decay=0.0,
        )
        self._mean = RunningMean(self._weights, job.options.we_every)
        self._steps = 0
        loader = batches(
            job.task.train,
            job.transform,
            config.batch_size,
            shuffle=True,
            seed=config.seed + 7919,  # that of our loop in the second task
            drop_last=True,
            pin_memory=job.start.device.type == "cuda",
        )
        self._batches = cycle(loader)
        self._student.train()

    @torch.no_grad()
    def _class_means(self, teacher: VisionLanguageModel) -> Tensor:
        images, device = self._job.task.train, self._job.start.device
        loader = batches(images, self._job.start.preprocess, 64, shuffle=False, seed=0)
        with self._precision.autocast():
            features = [
                _normalised(teacher.clip.encode_image(batch.to(device))) for batch, *_ in loader
            ]
        target = torch.as_tensor(list(images.targets), device=device)
        return class_means(torch.cat(features), target, len(self._job.task.classes))

    def step(self) -> float:
        """Take a step and return its loss."""
        images, target, _ = next(self._batches)
        device = self._job.start.device
        images, target = images.to(device), target.to(device)

        def features(model: VisionLanguageModel, prototypes: Tensor) -> Features:
            with self._precision.autocast():
                return Features(
                    _normalised(model.clip.encode_image(images)),
                    _normalised(model.clip.encode_text(self._tokens)),
                    model.logit_scale,
                    prototypes,
                )

        with torch.no_grad():
            teachers = [
                features(*given) for given in zip(self._teachers, self._prototypes, strict=True)
            ]
        student = features(self._student, self._own_prototypes())
        loss = objective(student, teachers, target, self._job.options)
        self._own_prototypes.observe(student.images.detach(), target)
        self._optimizer.zero_grad()
        scaler = self._precision.scaler
        scaler.scale(loss).backward()
        scaler.step(self._optimizer)
        scaler.update()
        self._steps += 1
        self._mean.observe(self._weights, self._steps)
        return loss.item()


def _normalised(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=-1)


def objective(
    student: Features, teachers: list[Features], target: Tensor, o: MulKI.Options
) -> Tensor:
    """The objective of `mulki.stages.objective`, with the gate "label", in plain PyTorch."""
    temperature = o.temperature
    logits = student.scale * student.images @ student.texts.T
    said = [t.scale * t.images @ t.texts.T for t in teachers]
    true = torch.stack(
        [F.log_softmax(z / temperature, 1).gather(1, target[:, None])[:, 0] for z in said], 1
    )
    weights = F.softmax(true / o.gate_temperature, dim=1)
    per_class = class_weights(weights, target, len(student.texts))

    def kl(own: Tensor, of_teachers: list[Tensor], rows: Tensor) -> Tensor:
        log_q = F.log_softmax(own / temperature, dim=1)
        parts = [
            rows[:, k] * F.kl_div(log_q, F.softmax(z / temperature, 1), reduction="none").sum(1)
            for k, z in enumerate(of_teachers)
        ]
        return temperature**2 * torch.stack(parts).sum(0).mean()

    def diagonal(z: Tensor) -> Tensor:
        classes = torch.arange(len(z), device=z.device)
        return (F.cross_entropy(z, classes) + F.cross_entropy(z.T, classes)) / 2

    prototypes = student.prototypes
    assert prototypes is not None
    loss = F.cross_entropy(logits, target, label_smoothing=o.label_smoothing)
    loss = loss + o.alignment * diagonal(student.scale * prototypes @ student.texts.T)
    loss = loss + o.image_text * kl(logits, said, weights)
    for share, rows, left, right in (
        (o.image_image, weights, "images", "prototypes"),
        (o.text_image, per_class, "texts", "prototypes"),
        (o.text_text, per_class, "texts", "texts"),
    ):
        own, *others = (
            m.scale * getattr(m, left) @ getattr(m, right).T for m in (student, *teachers)
        )
        loss = loss + share * kl(own, others, rows)
    for k, t in enumerate(teachers):
        distance = (student.images - t.images).square().sum(1)
        loss = loss + o.feature * (weights[:, k] * distance).mean()
    return loss


def compare(job: Job, rounds: int) -> list[Row]:
    """A row for each loop; the second has the ratio of the times.

    Args:
        rounds: as `prepare` got them.

    Raises:
        InputError: the losses of the first step differ.
    """
    loop, device = PlainLoop(job), job.start.device
    seconds: dict[str, list[float]] = {"plain": [], "mulki": []}
    growth: dict[str, int | None] = {}
    once: list[float] = []
    peaks: list[PeakMemory] = []

    def listen(report: StepReport, of_ours: float) -> None:
        if peaks:
            growth["mulki"] = peaks.pop().growth()
        last_of_warm_up = report.step == job.warm_up
        peak = PeakMemory(str(device)) if last_of_warm_up else None
        begun = _now(device)
        loss = loop.step()
        of_plain = _now(device) - begun
        if peak is not None:
            growth["plain"] = peak.growth()
        if report.step == 1:
            once.append(of_ours)
            _check(sum(report.losses.values()), loss, job.config.precision)
        if report.step > job.warm_up:
            seconds["plain"].append(of_plain)
            seconds["mulki"].append(of_ours)
        if report.step == job.warm_up - 1:
            peaks.append(PeakMemory(str(device)))

    with no_garbage_collection():
        learn(job, listen)
    images = min(job.config.batch_size, len(job.task.train))
    rows: list[dict[str, Cell]] = []
    for name, of in seconds.items():
        grown = growth[name]
        rows.append(
            job.columns()
            | {
                "loop": name,
                "images_per_second": images / median(of),
                "growth_mib": None if grown is None else grown / MIB,
                "speedup": None,
                "once_s": None,
            }
        )
    rows[1]["speedup"] = float(np.median(np.divide(seconds["plain"], seconds["mulki"])))
    rows[1]["once_s"] = once[0] - median(seconds["mulki"])
    return list(rows)


def _check(ours: float, plain: float, precision: str) -> None:
    allowed = TOLERANCE.get(precision, TOLERANCE_HALF)
    print(f"loss of the first step: {ours:.6f} (mulki), {plain:.6f} (plain)", flush=True)
    if not math.isclose(ours, plain, rel_tol=allowed):
        raise InputError(
            f"the losses of the first step differ: {ours:.6f} and {plain:.6f}, allowed a relative "
            f"difference of {allowed:g}"
        )


# --- The memory of large models

MOST = "--lora-rank 16 --grad-checkpointing"
CACHED = "all weights, --teacher-cache"
FORMS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, --grad-checkpointing": {"grad_checkpointing": True},
    CACHED: {},
    "--lora-rank 16": {"lora_rank": 16},
    MOST: {"lora_rank": 16, "grad_checkpointing": True},
}
BATCHES = (64, 1024, 16384)
# By model, the forms and the batches that are measured too.
MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "mulki-mini": {"all weights": (64, 1024)},
    "ViT-B-16": dict.fromkeys(FORMS, (64,)),
    "ViT-L-14": dict.fromkeys(set(FORMS) - {CACHED}, (64,)),
    "ViT-H-14": {MOST: (64,)},
}
# Images in a measured batch, where the whole one takes too long.
FEWER = {"ViT-L-14": 16, "ViT-H-14": 16}
CARDS = (8, 16, 24, 40, 80)
MICRO_BATCH = 8


def large(names: Sequence[str], output: str | None) -> list[Row]:
    """The rows of these models, each written as soon as it is there."""
    rows: list[Row] = []
    for model, form in product(names, FORMS):
        for row in _alone(counted, model, form):
            if row["batch"] in MODELS[model].get(form, ()):
                row["images"] = FEWER.get(model, row["batch"])
                row["measured"] = _alone(measured, model, form, row["images"])
            rows.append(row)
            print(row, flush=True)
            if output:
                write_csv(output, [row], "cpu")
    return rows


def counted(model: str, form: str) -> list[dict[str, Cell]]:
    """What is counted of a step, a row for each batch."""
    from mulki.train.card import most, ways

    rows: list[dict[str, Cell]] = []
    with _prepared(model, form, MICRO_BATCH) as setup:
        way, size = next(ways(setup)), setup.model.image_size
    for batch in BATCHES:
        mib = {
            "counted": way.held + most(way.kept, batch) + way.step(MICRO_BATCH),
            "models": way.models,
            "optimizer": way.optimizer,
            "step": way.step(1),
            "evaluation": way.evaluation,
            "image": way.image,
            "kept": most(way.kept, batch),
            # The task's and those made of them, in float32.
            "host": 2 * batch * 3 * size**2 * 4,
        }
        rows.append(
            {"model": model, "form": form, "batch": batch, "images": None, "measured": None}
            | {name: value / MIB for name, value in mib.items()}
            | {f"on_{card}": way.images(card * 10**9, batch) for card in CARDS}
        )
    return rows


def measured(model: str, form: str, batch: int) -> float:
    """MiB by which this process grows in two steps of so many images."""
    from mulki.train.task_learner import TaskLearner

    peak = PeakMemory("cpu")
    with _prepared(model, form, batch) as setup:
        task = setup.tasks[0]
        # Each class in its turn, and all again where the task has fewer images.
        few = sampled(task, min(batch, len(task.train))).train
        places = [i % len(few) for i in range(max(batch, len(few)))]
        TaskLearner(setup).learn(0, replace(task, train=Subset(few, places)), Listeners())
    growth = peak.growth()
    assert growth is not None, "Linux alone says how much memory a process has had"
    return growth / MIB


@contextlib.contextmanager
def _prepared(model: str, form: str, batch: int) -> Iterator[Any]:
    from mulki.train.start.setup import prepared

    given: dict[str, Any] = {
        "tasks": ("embedded:digits", "embedded:animals"),
        "model": model,
        "method": "mulki",
        "precision": "amp_bf16",
        "precision_eval": "amp_bf16",
        "batch_size": batch,
        "micro_batch": str(MICRO_BATCH),
        "iterations": 2,
    }
    if model != BUNDLED:
        given["pretrained"] = "none"
    with tempfile.TemporaryDirectory() as cache:
        if form == CACHED:
            given["teacher_cache"] = cache
        with prepared(resolve(given | FORMS[form]), write=False) as setup:
            yield setup


def _alone(call: Callable[..., Any], *given: Any) -> Any:
    # In a process of its own, whose memory is that of this call.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, *given).result()


# --- The start of a task, as its images grow in number

FILES, MEMBERS = "files in class folders", "members of a shard"
COUNTS = {FILES: (1_000, 10_000, 100_000), MEMBERS: (10_000, 100_000, 1_000_000)}
CLASSES = 100


def growth(of: str, count: int, place: Path) -> Row:
    """Write so many files or members, and read them in another process.

    Args:
        of: a key of `COUNTS`.
        count: at least four for each class, and even.
        place: an empty folder.
    """
    small, root = place / "small", place / "task"
    for folder, number in ((small, 4 * CLASSES), (root, count)):
        folder.mkdir()
        (_write_images if of == FILES else _write_shard)(folder, number)
    images, cpu, memory = _alone(_cost_of_reading, of, small, root)
    if images != (count if of == FILES else count // 2):
        raise RuntimeError(f"{count} {of} were written, {images} images found")
    return {
        "of": of,
        "count": count,
        "megabytes": sum(f.stat().st_size for f in root.rglob("*") if f.is_file()) / 1e6,
        "cpu": cpu,
        "cpu_each": cpu / count * 1e6,
        "memory": None if memory is None else memory / 1e6,
        "memory_each": None if memory is None else memory / count,
    }


def _cost_of_reading(of: str, small: Path, root: Path) -> tuple[int, float, int | None]:
    # Images, seconds of processor time in all threads, and bytes by which memory grew.
    def read(folder: Path) -> int:
        task = folder_task(folder) if of == FILES else shard_task(folder, test_fraction=0.2)
        task.fingerprint()
        return len(task.train) + len(task.test)

    read(small)
    peak, before = PeakMemory("cpu"), time.process_time()
    images = read(root)
    return images, time.process_time() - before, peak.growth()


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _write_images(root: Path, count: int) -> None:
    # Noise of about 1 KB in the class folders of two splits.
    random = np.random.default_rng(0)
    contents = [_png(random.integers(0, 256, (18, 18, 3), dtype=np.uint8)) for _ in range(CLASSES)]
    folders = [root / s / f"class_{c:03d}" for s in ("train", "test") for c in range(CLASSES)]
    for folder in folders:
        folder.mkdir(parents=True)
    for number in range(count):
        folder = folders[number % len(folders)]
        (folder / f"{number}.png").write_bytes(contents[number % CLASSES])


def _write_shard(root: Path, count: int) -> None:
    # So many members, two for each image.
    image = _png(np.full((4, 4, 3), (0, 128, 128), np.uint8))
    (root / "classes.txt").write_text("".join(f"class {c}\n" for c in range(CLASSES)))
    with tarfile.open(root / "all.tar", "w") as tar:
        for number in range(count // 2):
            for suffix, content in (("png", image), ("cls", str(number % CLASSES).encode())):
                entry = tarfile.TarInfo(f"{number:07d}.{suffix}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
                tar.members.clear()


# --- Training beside another process

# As a process gets it: None is the library's own, 300,000 where threads have cores of their own.
SPIN_COUNTS = (None, 0, 100, 1_000, 10_000, 100_000)
STEPS = 25
TRAINING = """
import json, logging, sys
from benchmarks.step import learn, prepare
logging.getLogger("mulki").setLevel(logging.ERROR)
job = prepare("flags", int(sys.argv[1]), batch_size=64, device="cpu")
seconds = []
learn(job, lambda report, of_step: seconds.append(of_step))
print(json.dumps([64 / s for s in seconds[2:]]))
"""


def rate(count: int | None, threads: int, steps: int = STEPS) -> float:
    """Images a second of a training step, the median of a new process."""
    settings = {"OMP_NUM_THREADS": str(threads)}
    if count is not None:
        settings["GOMP_SPINCOUNT"] = str(count)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", TRAINING, str(steps)],
        env=inherited | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return median(json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def busy_process() -> Iterator[None]:
    """A process that computes on one core while the context lasts."""
    process = subprocess.Popen([sys.executable, "-c", "while True: sum(range(1000))"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def neighbour(rounds: int) -> list[Row]:
    """A row for each spin count with as many threads as cores, and one for a thread less."""
    cores = os.cpu_count() or 1
    settings = [(count, cores) for count in SPIN_COUNTS] + [(None, max(1, cores - 1))]
    alone: list[list[float]] = [[] for _ in settings]
    beside: list[list[float]] = [[] for _ in settings]
    for _ in range(rounds):
        for place, setting in enumerate(settings):
            alone[place].append(rate(*setting))
            with busy_process():
                beside[place].append(rate(*setting))
    return [
        {
            "spin_count": "not set" if count is None else count,
            "omp_threads": threads,
            "alone": median(alone[place]),
            "beside": median(beside[place]),
        }
        for place, (count, threads) in enumerate(settings)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Check, measure, print and store."""
    parser = parser_with_output(__doc__)
    parser.add_argument(
        "what", nargs="?", default="step", choices=("step", "large", "growth", "neighbour")
    )
    parser.add_argument("--rounds", type=int, default=5, help="steps, or trainings, that are timed")
    of_step = parser.add_argument_group("step")
    of_step.add_argument("--model", default=BUNDLED, help="an open_clip model, or mulki-mini")
    of_step.add_argument("--task", default="flags", help="of the bundled pack")
    of_step.add_argument("--batch-size", type=int, default=64)
    of_step.add_argument("--limit-images", type=int, help="of the task; by default one batch")
    of_step.add_argument("--augment", default="none", help="crop: teachers cannot be kept")
    of_step.add_argument("--lock-text", action="store_true", default=None)
    of_step.add_argument("--precision", default="fp32")
    of_step.add_argument("--device", default="cpu")
    of_step.add_argument("--threads", type=int, default=0, help="on the CPU; 0: as torch has them")
    of_large = parser.add_argument_group("large")
    of_large.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS], metavar="MODEL")
    of_growth = parser.add_argument_group("growth")
    of_growth.add_argument("--most", type=int, default=sys.maxsize, help="leave out larger ones")
    of_growth.add_argument("--folder", help="where files are written; the system's if left out")
    a = parser.parse_args(argv)
    logging.getLogger("mulki").setLevel(logging.ERROR)  # random weights are meant
    if a.threads:
        torch.set_num_threads(a.threads)
    print(machine_line(a.device), flush=True)
    if a.what == "large":
        print(markdown(large(a.models, a.output)))
    elif a.what == "growth":
        rows = []
        for of, counts in COUNTS.items():
            for count in filter(lambda n: n <= a.most, counts):
                with tempfile.TemporaryDirectory(dir=a.folder) as folder:
                    rows.append(growth(of, count, Path(folder)))
        show(rows, a.output, "cpu")
    elif a.what == "neighbour":
        show(neighbour(a.rounds), a.output, "cpu")
    else:
        names = ("model", "batch_size", "limit_images", "augment", "lock_text", "precision")
        job = prepare(a.task, a.rounds, device=a.device, **{n: getattr(a, n) for n in names})
        show(compare(job, a.rounds), a.output, a.device)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"benchmarks.step: error: {error}")
