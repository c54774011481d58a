"""The interface between training and a method, which says what is trained.

A method declares which features it needs, and its losses are a function of those features, the
targets and its own state. Only `mulki.train` encodes, so caching of frozen teachers, precision,
micro-batches and several processes are written once. A method may also make images of those of a
batch, for which it is given a function that encodes; prepare a task, add terms on parameters,
change gradients before each step, act after it, and after a task.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from mulki.choices.options import check_options, option
from mulki.clip.features import Features
from mulki.functional import prototype_cross_entropy
from mulki.stages.connecting import Connections

ZERO_SHOT = "zero_shot"
PREVIOUS = "previous"
SEEN = "seen"
VOCABULARY = "vocabulary"
# What a vocabulary is called in `Needs.uses`.
WORDS = "a vocabulary of words"


def label_smoothing_option() -> Any:
    """The field of a method's options for the label smoothing of its cross-entropy."""
    text = "label smoothing of the cross-entropy, in [0, 1]"
    return option(0.0, text, low=0, high=1, alias="--ls", of_classes=True)


@dataclass(frozen=True)
class Replay:
    """Training images of earlier tasks that a method is shown again.

    Args:
        size: how many are kept, of all earlier tasks together.
        choice: which ones, see `mulki.data.replay.kept_places`.
        batch_size: how many of them come with each batch, in each process; None for as many as
            there are images in it.
    """

    size: int
    choice: str
    batch_size: int | None = None


@dataclass(frozen=True)
class Needs:
    """The features that a method needs besides the student's images and class texts.

    Args:
        teachers: of `ZERO_SHOT` (the original model) and `PREVIOUS` (the model after the previous
            task; the start model at the first), in the order the losses get them.
        caption_teachers: those of a task of captions; None for the same.
        teacher_images: whether the teachers encode the task's images. Without them a teacher's
            `Features` have no row of images and no prototypes.
        prototypes: class means over the task's training set, of the original model and of each
            teacher that encodes its images.
        reference: a batch of images and captions from the reference set of the run beside each
            batch, encoded by the student and by each teacher; see `Features.reference`.
        captions: whether the captions are encoded; without them the reference set is images alone.
        student_captions: whether the student encodes them too, with gradient.
        anchors: of `SEEN` (the classes of earlier tasks) and `VOCABULARY` (the words of the run's
            vocabulary), texts beyond the task's classes that each teacher encodes; see
            `Features.seen` and `Features.vocabulary`.
        student_anchors: whether the student encodes these texts too, with gradient.
        replay: images of earlier tasks that the student encodes beside each batch, with gradient,
            and the classes of these tasks; see `Features.replay`.
        inputs: whether the method makes another image of each image of a batch, which the student
            encodes, with gradient, and each teacher; see `Method.inputs`.
        directions: for methods that choose the A of adapters, which then does not train: the mean
            gradient of the weights with adapters before a task, see `TaskStart.gradients`, and the
            second moments of their inputs at its end, see `Method.keep_moments`.
        fisher: training images on which the Fisher information of the weights is measured at a
            task's end, see `Method.keep_fisher`; 0 for none.
    """

    teachers: tuple[str, ...] = ()
    caption_teachers: tuple[str, ...] | None = None
    teacher_images: bool = True
    prototypes: bool = False
    reference: bool = False
    captions: bool = True
    student_captions: bool = True
    anchors: tuple[str, ...] = ()
    student_anchors: bool = False
    replay: Replay | None = None
    fisher: int = 0
    inputs: bool = False
    directions: bool = False

    def without_classes(self) -> Needs:
        """What is left of them in a task of captions: the teachers, which encode the captions."""
        return Needs(self.teachers if self.caption_teachers is None else self.caption_teachers)

    @property
    def uses(self) -> tuple[str, ...]:
        """What goes beyond the images and class names of a task and the start model, in words."""
        images = "reference images and captions" if self.captions else "reference images"
        used = {
            "class names of earlier tasks": SEEN in self.anchors or self.replay is not None,
            WORDS: VOCABULARY in self.anchors,
            images: self.reference,
            "images of earlier tasks": self.replay is not None,
        }
        return tuple(words for words, needed in used.items() if needed)


class Encode(Protocol):
    """``encode(images, teacher=None)``, by which `Method.inputs` encodes.

    From images [n, 3, H, W], on any device, to their L2-normalised features [n, D], with gradients
    to the images: of the teacher of that place in `Needs.teachers`, or of the student for None.
    More images than a micro-batch are encoded in several, and again in the backward pass, so that
    the graph of one is held at a time; `--micro-batch auto` and `mulki plan` do not count these
    graphs. With several processes all have to call it, with equal n. With ``--precision amp`` the
    gradients are not scaled: take those of a sum over images, since those of a mean may vanish.
    """

    def __call__(self, images: Tensor, teacher: int | None = None) -> Tensor: ...


class AdaptedWeight(NamedTuple):
    """A weight with a low-rank adapter: a multiple of ``b a`` is added to it.

    Attributes:
        original: [out, in], that of the start model.
        a: [r, in], live; does not train.
        b: [out, r], live, zero at the task's start.
    """

    original: Tensor
    a: Tensor
    b: Tensor


@dataclass(frozen=True)
class TaskStart:
    """What a method is given before the first step of a task.

    Args:
        index: 0 for the first task.
        num_classes: C; 0 in a task of captions.
        steps: optimiser steps the task will take.
        weights: the student's trainable parameters by name; not copies.
        prototypes: [C, D] class means of the original model if `Needs.prototypes`, else None.
        adapted: the weights with adapters, by name, if `Needs.directions`.
        gradients: [out, in] of each of these, the mean gradient of the cross-entropy over the
            task's training images, if `Needs.directions`; None in a task that goes on.
    """

    index: int
    num_classes: int
    steps: int
    weights: Mapping[str, nn.Parameter]
    prototypes: Tensor | None
    adapted: Mapping[str, AdaptedWeight] = field(default_factory=dict)
    gradients: Mapping[str, Tensor] | None = None


class Method(nn.Module):
    """Base class of methods; a method's own parameters are trained beside the student's.

    Subclasses define `name`, an `Options` dataclass of hyper-parameters (fields made by `option`,
    which become command line options), `needs` and `losses`. What a method keeps from one step or
    task to the next is in its state dict, so that a run that was killed can go on: parameters and
    buffers are, anything else goes through torch's `get_extra_state` and `set_extra_state`, as
    nested lists and dicts, with texts as keys, of tensors, numbers and texts. A method that goes on
    gets the state dict before `start_task`, as far as it fits, and again after it. Its tensors take
    the sizes that they had; a parameter has to have its size again after `start_task`. What
    `__init__` and `start_task` draw from torch's generator comes from the seed and is the same in
    all processes. A method that connects models sets `_connections` in `start_task`, and
    `penalties`, `after_step` and `end_task` serve it.

    Raises:
        InputError: an option is out of bounds.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    trains: ClassVar[bool] = True

    @dataclass(frozen=True)
    class Options:
        """Hyper-parameters; none here."""

    # Of the class where it is the same for all options, else of each method.
    needs: Needs = Needs()

    def __init__(self, options: Options):
        super().__init__()
        check_options(options)
        self.options = options
        self._connections: Connections | None = None

    @property
    def averages(self) -> bool:
        """Whether a task ends with a mean of the weights of many steps, so that none is best."""
        return False

    @property
    def takes_mean(self) -> bool:
        """Whether a task ends with a mean of weights, of many steps or of two models."""
        return self.averages

    def goes_on(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Take note of what the first task began with, in a run that goes on after that task.

        Args:
            weights: of the start model, those that train, by name; not copies.
        """

    def kept(self) -> dict[str, Tensor]:
        """What later tasks need of those learned so far, beside the weights; nothing by default.

        It lies beside each checkpoint, for a run that goes on after it.
        """
        return {}

    def take_kept(self, kept: Mapping[str, Tensor]) -> None:
        """Set what `kept` returned, on the CPU, in a run that goes on; before its first task."""

    def start_task(self, task: TaskStart) -> None:
        """Prepare a task. Called before its optimiser is made."""

    def prototypes(self) -> Tensor | None:
        """The student's prototypes [C, D], or None."""
        return None

    def inputs(
        self, images: Tensor, target: Tensor, teachers: tuple[Features, ...], encode: Encode
    ) -> Tensor:
        """Another image made of each of a batch, such as one crafted with a model's gradient.

        Called before `losses` if `Needs.inputs`, in each process with its part of the batch, and
        not in a task of captions. What it draws from torch's generators is the same in a run that
        goes on, and another in each process. Gradients of weights that it leaves behind are
        dropped. It keeps nothing, since each process has its own part, whose last image may be
        there twice.

        Args:
            images: [b, 3, H, W], normalised as the model takes them, not to be changed in place; on
                the host where they are encoded in micro-batches, else on the model's device.
            target: [b] int64, on the model's device.
            teachers: as `losses` gets them, but that `images` are the features of these alone.
            encode: features of images by the student or a teacher, with gradients to the images.

        Returns:
            [b, 3, H, W], whose features are `Features.inputs` of the student and of the teachers,
            for all B images of the batch.
        """
        raise TypeError(f"method {self.name} makes no images")

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        """Weighted scalar terms of the objective, each named ``..._loss``; their sum is minimised.

        What it keeps from step to step it replaces and does not change in place, so that a step
        whose loss is not finite can be undone.

        Args:
            student: features of a batch of B images and the task's C class texts.
            teachers: those of `needs.teachers`, in that order.
            target: [B] int64.
        """
        raise TypeError(f"method {self.name} does not train")

    def pair_losses(
        self, student: Features, teachers: tuple[Features, ...], distinct: Tensor | None
    ) -> dict[str, Tensor]:
        """As `losses`, of a task of captions. A method that learns no such task has none.

        Args:
            student: features of a batch of B images and, as its texts, of their B captions.
            teachers: those of `needs.teachers`, in that order.
            distinct: rows whose image and caption have not come before in the batch, [n] int64 on
                the CPU; None for all. To all others a pair of the batch is a wrong negative.
        """
        raise TypeError(f"method {self.name} does not learn from captions")

    @classmethod
    def takes_captions(cls) -> bool:
        """Whether a run with it may have tasks of captions."""
        return not cls.trains or cls.pair_losses is not Method.pair_losses

    def penalties(self) -> dict[str, Tensor]:
        """Scalar terms on the parameters, named ``..._loss``."""
        return {} if self._connections is None else self._connections.penalties()

    def watched(self) -> dict[str, Tensor]:
        """What a display shows of the last step beside its losses; read at logged steps alone.

        ``teacher_weights`` is [B, K], the weight of each of `needs.teachers` for each image.
        ``prototype_drift`` is [C], the cosine distance of each of the student's prototypes from the
        one at the task's start. Nothing by default.
        """
        return {}

    def before_step(self, weights: Mapping[str, nn.Parameter]) -> None:
        """May change the gradients in place, between the backward pass and the optimiser's step.

        Args:
            weights: the student's trainable parameters by name; the gradients are those of the
                whole batch, not scaled, and not clipped yet. Sharded parameters are DTensors.
        """

    def after_step(self, step: int) -> None:
        """Called after optimiser step `step` of the task, counted from 1.

        Also after one whose update the guard against spikes has left out.
        """
        if self._connections is not None:
            self._connections.after_step(step)

    def keep_fisher(self, fisher: Mapping[str, Tensor]) -> None:
        """Called after the last step, before `end_task`, if `Needs.fisher`.

        Args:
            fisher: the diagonal of the Fisher information of each trainable weight, by name, see
                `mulki.train.learning.fisher`.
        """

    def keep_moments(self, moments: Mapping[str, Tensor]) -> None:
        """Called after the last step, before `end_task`, if `Needs.directions`.

        Args:
            moments: [in, in] of each weight with an adapter, by name: the sum of ``x x^T`` over its
                inputs x, of the task's training images and class texts.
        """

    def end_task(self) -> None:
        """Called after the last step; may change the weights in place before evaluation."""
        if self._connections is not None:
            self._connections.end_task()
            self._connections = None  # its copies are as large as the model


class ClassLoss(Method):
    """The base of methods whose loss is the cross-entropy of the task's classes alone."""

    options: Options

    @dataclass(frozen=True)
    class Options(Method.Options):
        """Hyper-parameters that all of them have."""

        label_smoothing: float = label_smoothing_option()

    def losses(
        self, student: Features, teachers: tuple[Features, ...], target: Tensor
    ) -> dict[str, Tensor]:
        return {
            "ce_loss": prototype_cross_entropy(
                student.image_text(), target, label_smoothing=self.options.label_smoothing
            )
        }
