"""What a step needs on a card of any size, counted from shapes: no card, and nothing is computed.

The step runs on torch's fake tensors, which have shapes and no content, and every storage that it
makes and frees is counted. So what checkpointing recomputes and adapters merge is in the figure;
the workspace of libraries, and what an allocator cannot use, is not.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError
from mulki.methods import Needs
from mulki.train.config.tasks import teachers_of
from mulki.train.start.setup import Setup
from mulki.train.task_learner import anchors_per_step

# Rank of the adapters that are tried.
_RANK = 16
# Part of a card that is left to libraries and to what the allocator cannot use.
_RESERVED = 0.1
# Images of the counts from which those of another number are taken.
_COUNTS = ((1, 2), (16, 32), (512, 1024))


class Peak(NamedTuple):
    """Bytes of a step that encodes n images at a time: ``fixed + n * image``."""

    fixed: int
    image: int


@dataclass(frozen=True)
class Way:
    """A way to take a step. Sizes are in bytes.

    Args:
        options: beside those of the run, as on the command line.
        models: student and teachers; not what a method copies of the weights for itself (`ewc`,
            `wise_ft`, a running mean, an anchor of weights).
        optimizer: the two moments of AdamW.
        peaks: what else a step needs, the largest of these: texts, gradients and activations.
        kept: what is kept of each image of a batch, in whatever micro-batches it is encoded: its
            features of all models, the gradient of the student's, and logits. The images themselves
            are in the host's memory where a batch is more than one micro-batch.
        kinds: images that come beside each other: of the task, of a reference set, of earlier
            tasks. Micro-batches are of one kind at a time, a batch as a whole is of all.
    """

    options: str
    models: int
    optimizer: int
    peaks: tuple[Peak, ...]
    kept: int
    kinds: int

    def step(self, images: int) -> int:
        """Bytes of a step beside models and optimiser, with so many images encoded at a time."""
        return max(peak.fixed + images * peak.image for peak in self.peaks)

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
        free = (1 - _RESERVED) * card - self.models - self.optimizer - batch * self.kept
        if self.step(self.kinds * batch) <= free:
            return batch
        fit = [(free - peak.fixed) // max(peak.image, 1) for peak in self.peaks]
        return min(max(int(min(fit)), 0), batch - 1)

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self) | {"peaks": [peak._asdict() for peak in self.peaks]}


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
    mode, texts = FakeTensorMode(), _texts(setup)
    with FakeCopyMode(mode):
        model = copy.deepcopy(setup.model)
    with mode:
        try:
            if recompute:
                model.checkpoint_activations()
            if adapters:
                model.adapt(_RANK, fixed_a=method.needs.directions)
        except InputError:
            return None
        peaks = tuple(_peak(setup, model, texts, *counts) for counts in _COUNTS)
        kept, kinds = _kept(setup, model, texts[0][0]), _kinds(_needs(setup))
        trained = sum(value.nbytes for value in model.trainable().values())
    if model.adapters is not None:
        beside = 0 if setup.original is None else _bytes(setup.original)
    else:
        beside = _teachers(setup) * sum(p.nbytes for p in setup.model.trainable().values())
    options = ["--grad-checkpointing"] * recompute + [f"--lora-rank {_RANK}"] * adapters
    return Way(
        " ".join(options),
        _bytes(model) + beside,
        2 * trained,
        peaks,
        kept,
        kinds,
    )


def _teachers(setup: Setup) -> int:
    # Models beside the student, which share with it what does not train.
    names = teachers_of(setup.method, setup.tasks)
    single = len(setup.tasks) == 1 and setup.original is None
    return min(len(names), 1) if single else len(names)


def _texts(setup: Setup) -> tuple[tuple[int, ...], torch.dtype]:
    # Shape and type of the texts of a step, in the largest task; captions come on top.
    needs, most = setup.method.needs, max(len(task.classes) for task in setup.tasks)
    if needs.student_anchors:
        words = setup.vocabulary.words if setup.vocabulary is not None else ()
        known = len(words) + sum(len(task.classes) for task in setup.tasks)
        most += min(anchors_per_step(setup, needs) or known, known)
    one = setup.model.text_inputs(["a"])
    return (most, *one.shape[1:]), one.dtype


def _peak(
    setup: Setup,
    model: VisionLanguageModel,
    texts: tuple[tuple[int, ...], torch.dtype],
    images: int,
    more: int,
) -> Peak:
    low, high = (_bytes_of_step(setup, model, texts, n) for n in (images, more))
    image = (high - low) // (more - images)
    return Peak(low - images * image, image)


def _kept(setup: Setup, model: VisionLanguageModel, texts: int) -> int:
    # Of an image: float32 features and logits of each model, and the gradients of the student's.
    needs, size = _needs(setup), model.image_size
    width = model.encode_images(torch.empty(1, 3, size, size, device=model.device)).shape[-1]
    values = 2 + len(teachers_of(setup.method, setup.tasks))
    return 4 * values * (_kinds(needs) * width + texts)


def _needs(setup: Setup) -> Needs:
    needs = setup.method.needs
    return needs if any(task.classes for task in setup.tasks) else needs.without_classes()


def _kinds(needs: Needs) -> int:
    # Images of a reference set and those of earlier tasks come at the same time.
    return 1 + needs.reference + (needs.replay is not None)


def _bytes_of_step(
    setup: Setup, model: VisionLanguageModel, texts: tuple[tuple[int, ...], torch.dtype], count: int
) -> int:
    model.clip.zero_grad()
    shape, dtype = texts
    needs, size = _needs(setup), model.image_size
    captions = needs.reference and needs.student_captions and needs.captions
    captions = captions or not all(task.classes for task in setup.tasks)
    images = torch.empty(count, 3, size, size, device=model.device)
    known = [*model.clip.parameters(), *model.clip.buffers(), images]
    with _Counted(known) as counted, setup.precision.autocast():

        def encoded(texts: int) -> Tensor:
            prompts = torch.zeros((texts, *shape[1:]), dtype=dtype, device=model.device)
            return model.encode_texts(prompts)

        if shape[0] and model.trains_texts:
            encoded(shape[0]).sum().backward()
        # From the second micro-batch on, all gradients are there.
        for _ in range(2):
            features = model.encode_images(images).sum()
            if captions and model.trains_texts:
                # An image and its caption are encoded in one graph.
                features = features + encoded(count).sum()
            features.backward()
    return counted.peak


def _bytes(model: VisionLanguageModel) -> int:
    known = {id(value): value.nbytes for value in (*model.clip.parameters(), *model.clip.buffers())}
    return sum(known.values())


class _Counted(TorchDispatchMode):
    # Counts the bytes of storages that live at the same time, without those that are known.
    def __init__(self, known: Iterable[Tensor]):
        super().__init__()
        self.peak = self._now = 0
        self._seen = weakref.WeakSet(value.untyped_storage() for value in known)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves(out):
            if isinstance(value, Tensor) and (storage := value.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._free, storage.nbytes())
        return out

    def _free(self, count: int) -> None:
        self._now -= count
