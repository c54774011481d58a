"""What a step needs on a card of any size, counted from shapes: no card, and nothing is computed.

The step runs on torch's fake tensors, which have shapes and no content, and every storage that it
makes and frees is counted. So what checkpointing recomputes and adapters merge is in the figure;
the workspace of libraries, and what an allocator cannot use, is not.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mulki.clip.evaluation import tested_texts
from mulki.clip.models import TEXT_BATCH, VisionLanguageModel
from mulki.data import Task
from mulki.errors import InputError
from mulki.methods import Needs
from mulki.train.config.precision import as_tested
from mulki.train.config.tasks import needs_of, teachers_of
from mulki.train.costs import bytes_of, stored_rows
from mulki.train.learning.learn import steps_of
from mulki.train.start.setup import Setup
from mulki.train.task_learner import anchors_per_step

# Rank of the adapters that are tried.
_RANK = 16
# Part of a card that is left to libraries and to what the allocator cannot use.
_RESERVED = 0.1
# Numbers of images for which it is looked up in which moment a step needs most.
_COUNTS = tuple(2**i for i in range(15))


class Peak(NamedTuple):
    """Bytes for n images: ``fixed + n * image``."""

    fixed: int
    image: int

    def of(self, images: int) -> int:
        """Bytes for so many images."""
        return self.fixed + images * self.image


def most(peaks: Iterable[Peak], images: int) -> int:
    """Bytes for so many images, the largest of these."""
    return max(peak.of(images) for peak in peaks)


class _Kind(NamedTuple):
    """Images that come in each step: of the task, of a reference set, or of earlier tasks.

    Args:
        size: how many; None for as many as a batch has.
        captions: whether the student encodes a caption with each.
        features: vectors that are kept of each, of all models, and the gradients of the student's.
    """

    size: int | None
    captions: bool
    features: int


@dataclass(frozen=True)
class Way:
    """A way to take a step. Sizes are in bytes.

    Args:
        options: beside those of the run, as on the command line.
        models: student and teachers; not what a method copies of the weights for itself (`ewc`,
            `wise_ft`, a running mean, an anchor of weights).
        optimizer: the two moments of AdamW.
        stored: features that teachers keep of the images of the largest task.
        kept: features of a batch, of all models, with the gradients of the student's. What losses
            take for themselves, in small batches about as much again, is not counted. Of this and
            the next two the largest one counts.
        peaks: what else a step in micro-batches needs: images, texts, gradients and activations.
        whole: what else a step needs that encodes all images of a batch at a time.
        evaluation: what else is needed before and after the steps: for a batch of an evaluation
            (``--batch-size-eval``), for texts that are encoded once, and for what ``keeplora``
            keeps of gradients and inputs.
    """

    options: str
    models: int
    optimizer: int
    stored: int
    kept: tuple[Peak, ...]
    peaks: tuple[Peak, ...]
    whole: tuple[Peak, ...]
    evaluation: int

    @property
    def held(self) -> int:
        """Bytes that are there between two steps."""
        return self.models + self.optimizer + self.stored

    def step(self, images: int) -> int:
        """Bytes of a step beside what is held and kept, in micro-batches of so many images."""
        return most(self.peaks, images)

    @property
    def image(self) -> int:
        """Bytes of one image more, at most."""
        return max(peak.image for peak in self.peaks)

    def images(self, card: int, batch: int) -> int:
        """How many images of a batch can be encoded at a time; 0: the card is too small.

        Args:
            card: its bytes.
            batch: images of a step. It needs no micro-batches where this is what is returned.
        """
        free = (1 - _RESERVED) * card - self.held
        if self.evaluation > free:
            return 0
        free -= most(self.kept, batch)
        if most(self.whole, batch) <= free:
            return batch
        fit = [(free - peak.fixed) // max(peak.image, 1) for peak in self.peaks]
        return min(max(int(min(fit)), 0), batch - 1)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        peaks = {"kept": self.kept, "peaks": self.peaks, "whole": self.whole}
        return asdict(self) | {name: [p._asdict() for p in of] for name, of in peaks.items()}


def ways(setup: Setup) -> Iterator[Way]:
    """The run's own way to take a step, and then those that other options give, counted.

    Args:
        setup: of a run, before anything is learned; its model stays as it is.
    """
    for adapters in (False, True):
        for recompute in (False, True):
            if (way := _way(setup, adapters=adapters, recompute=recompute)) is not None:
                yield way


def _way(setup: Setup, *, adapters: bool, recompute: bool) -> Way | None:
    config, method = setup.config, setup.method
    if adapters and (config.lora_rank or method.needs.fisher or method.takes_mean):
        return None
    if recompute and config.grad_checkpointing:
        return None
    mode, steps = FakeTensorMode(), _steps(setup)
    with FakeCopyMode(mode):
        # A tokenizer holds whole vocabularies, and no tensor.
        shared = {id(setup.model.tokenizer): setup.model.tokenizer}
        model = copy.deepcopy(setup.model, shared)
    with mode:
        try:
            if recompute:
                model.checkpoint_activations()
            if adapters:
                model.adapt(_RANK, fixed_a=method.needs.directions)
        except InputError:
            return None
        peaks, whole = (
            tuple(peak for step in steps for peak in step.peaks(model, whole))
            for whole in (False, True)
        )
        beside_steps, width = steps[0].beside_steps(model)
        trained = sum(value.nbytes for value in model.trainable().values())
    own = setup.original
    beside = 0 if own is None else bytes_of([own])
    if model.adapters is None:
        copies = _teachers(setup) - (own is not None)
        beside += copies * sum(p.nbytes for p in setup.model.trainable().values())
    elif method.needs.directions:
        beside_steps = max(beside_steps, model.adapters.bytes_of_directions)
    options = ["--grad-checkpointing"] * recompute + [f"--lora-rank {_RANK}"] * adapters
    return Way(
        " ".join(options),
        models=bytes_of([model]) + beside,
        optimizer=2 * trained,
        stored=4 * width * _teachers(setup) * max(map(steps[0].stored_rows, setup.tasks)),
        kept=tuple(step.kept(width) for step in steps),
        peaks=peaks,
        whole=whole,
        evaluation=beside_steps,
    )


def _teachers(setup: Setup) -> int:
    # Models beside the student, which share with it what does not train.
    names = teachers_of(setup.method, setup.tasks)
    single = len(setup.tasks) == 1 and setup.original is None
    return min(len(names), 1) if single else len(names)


def _steps(setup: Setup) -> list[_Step]:
    # Of the tasks with classes, and of those of captions.
    kinds = {bool(task.classes): needs_of(setup.method, task) for task in setup.tasks}
    return [_Step(setup, needs, pairs=not classes) for classes, needs in kinds.items()]


class _Step:
    # A step of a run, on fake tensors.
    def __init__(self, setup: Setup, needs: Needs, *, pairs: bool):
        self._setup, tasks = setup, setup.tasks
        teachers = _teachers(setup)
        own = 2 * (2 + teachers) if pairs else 2 + teachers * needs.teacher_images
        self._kinds = [_Kind(None, pairs, own)]
        if needs.reference:
            captions = needs.captions and needs.student_captions
            of_captions = needs.captions * teachers + 2 * captions
            size = setup.config.reference_batch_size
            self._kinds.append(_Kind(size, captions, 2 + teachers + of_captions))
        if needs.inputs:
            self._kinds.append(_Kind(None, False, 2 + teachers))
        if needs.replay is not None:
            self._kinds.append(_Kind(needs.replay.batch_size, False, 2))
        # Texts of a step in the largest task, with those of earlier tasks; captions come on top.
        classes = [0 if pairs else len(task.classes) for task in tasks]
        self._texts = max(classes) if needs.replay is None else sum(classes)
        if needs.student_anchors:
            words = setup.vocabulary.words if setup.vocabulary is not None else ()
            known = len(words) + sum(classes)
            self._texts += min(anchors_per_step(setup, needs) or known, known)
        self._prompt = setup.model.text_inputs(["a"])
        tested = [sum(map(len, tested_texts(task))) for task in tasks]
        anchors = len(setup.vocabulary.words) if setup.vocabulary is not None else 0
        most = min(max(*tested, anchors), TEXT_BATCH)
        self._tokens = most, *setup.model.tokenizer(["a"]).shape[1:]

    @torch.no_grad()
    def beside_steps(self, model: VisionLanguageModel) -> tuple[int, int]:
        # Of a test, or of a pass for teachers and class statistics; and the width of the features.
        config = self._setup.config
        # A frozen text tower encodes them, too.
        model.split = "tokens"
        with _Counted(_tensors(model)) as tested:
            self._once(as_tested(model, config.precision_eval))
        with _Counted(_tensors(model)) as encoded, self._setup.precision.autocast():
            width = self._once(model)
        return max(tested.peak, encoded.peak), width

    def _once(self, model: VisionLanguageModel) -> int:
        model.encode_texts(torch.zeros(self._tokens, dtype=torch.int64, device=model.device))
        return self._images(model, self._setup.config.batch_size_eval).shape[1]

    def stored_rows(self, task: Task) -> int:
        setup = self._setup
        return stored_rows(setup, task, steps_of(setup.config, len(task.train), setup.world.size))

    def kept(self, width: int) -> Peak:
        # Each process has the features of all of them.
        each = 4 * width * self._setup.world.size
        fixed = sum(kind.features * (kind.size or 0) for kind in self._kinds)
        return Peak(each * fixed, each * sum(k.features for k in self._kinds if k.size is None))

    def peaks(self, model: VisionLanguageModel, whole: bool) -> list[Peak]:
        moments: dict[tuple[_Kind, ...], list[Peak]] = {}
        found = []
        for count in _COUNTS:
            # A kind of which there are no more than a micro-batch is encoded once, with the texts.
            once = tuple(
                kind
                for kind in self._kinds
                if whole or (kind.size is not None and kind.size <= count)
            )
            if once not in moments:
                moments[once] = self._moments(model, once)
            found.append(max(moments[once], key=lambda moment: moment.of(count)))
        return [*dict.fromkeys(found)]

    def _moments(self, model: VisionLanguageModel, once: Sequence[_Kind]) -> list[Peak]:
        # The same storages come and go for any number of images but 1, where a copy can be a view.
        three, two = (self._levels(model, count, once) for count in (3, 2))
        if len(two) != len(three):  # the first time, a module has made what it keeps
            three = self._levels(model, 3, once)
        return [
            Peak(two_of - 2 * (three_of - two_of), three_of - two_of)
            for two_of, three_of in zip(two, three, strict=True)
        ]

    def _levels(self, model: VisionLanguageModel, count: int, once: Sequence[_Kind]) -> list[int]:
        model.clip.zero_grad()
        with _Counted(_tensors(model)) as counted, self._setup.precision.autocast():
            graphs = [self._of_kind(model, kind, kind.size or count) for kind in once]
            if self._texts and model.trains_texts:
                graphs.append(self._encoded(model, self._texts))
            with torch.no_grad():
                # The first pass of those in micro-batches.
                for kind in self._kinds:
                    if kind not in once:
                        self._of_kind(model, kind, count)
            if graphs and (total := torch.stack(graphs).sum()).requires_grad:
                total.backward()
            del graphs
            for kind in self._kinds:
                # From the second micro-batch on, all gradients are there.
                for _ in range(0 if kind in once else 2):
                    if (of_kind := self._of_kind(model, kind, count)).requires_grad:
                        of_kind.backward()
        # What is left is freed later.
        return [*counted.levels]

    def _of_kind(self, model: VisionLanguageModel, kind: _Kind, count: int) -> Tensor:
        features = self._images(model, count).sum()
        if kind.captions and model.trains_texts:
            features = features + self._encoded(model, count)
        return features

    def _images(self, model: VisionLanguageModel, count: int) -> Tensor:
        size = model.image_size
        return model.encode_images(torch.empty(count, 3, size, size, device=model.device))

    def _encoded(self, model: VisionLanguageModel, texts: int) -> Tensor:
        shape = texts, *self._prompt.shape[1:]
        prompts = torch.zeros(shape, dtype=self._prompt.dtype, device=model.device)
        return model.encode_texts(prompts).sum()


def _tensors(model: VisionLanguageModel) -> list[Tensor]:
    return [*model.clip.parameters(), *model.clip.buffers()]


class _Counted(TorchDispatchMode):
    # Counts the bytes of storages that live at the same time, without those that are known.
    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.levels = [0]
        self._seen = weakref.WeakSet(value.untyped_storage() for value in known)

    @property
    def peak(self) -> int:
        return max(self.levels)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._change(storage.nbytes())
                weakref.finalize(storage, self._change, -storage.nbytes())
        return out

    def _change(self, count: int) -> None:
        self.levels.append(self.levels[-1] + count)
