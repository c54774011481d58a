"""Zero-shot evaluation: the answers of a model on a task's test set through its class texts.

The classifier is the mean of all prompt templates' normalised text features, normalised again. The
label space is the task's own (task-incremental, as the MTIL benchmark of ZSCL does) or another one,
see `LabelSpace`; beside it, that of all tasks learned so far (class-incremental: one head). Where
there are class statistics, `mulki.clip.head` answers beside the texts. A prediction depends on its
image alone, so apart from rounding, which shows in half precision, accuracy does not depend on
batching or order.

A task of captions is evaluated by retrieval, see `mulki.clip.retrieval`; its classifier holds the
features of its captions, and it is no part of any label space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from mulki.clip.head import Head, class_key
from mulki.clip.models import VisionLanguageModel
from mulki.clip.retrieval import ranks, right_captions, turned
from mulki.clip.texts import text_features, text_inputs
from mulki.data.caption_task import CaptionedImages, CaptionTask
from mulki.data.loader import batch_sizes
from mulki.data.task import Task
from mulki.distributed.world import ALONE, World
from mulki.errors import InputError
from mulki.runs.answers import Answers, Ranks
from mulki.runs.predictions import TOP, Predictions

# Images [B, 3, H, W], targets [B] and their indices in the set, as `mulki.data.loader.batches`.
Loader = DataLoader[tuple[Tensor, int, int]]

# Among which classes a test image is classified: those of its task; those of all tasks learned so
# far, or of its task before that is learned (task-agnostic MTIL); those of all tasks (X-TAIL).
LabelSpace = Literal["task", "seen", "all"]


@torch.no_grad()
def zero_shot_classifier(
    model: VisionLanguageModel,
    inputs: Tensor,
    classes: int | Sequence[int],
    world: World = ALONE,
) -> Tensor:
    """Class weights [C, D], unit rows.

    Args:
        inputs: `model.text_inputs` of the prompts, class by class.
        classes: C, where all classes have equally many prompts; or how many each of them has, [C].
        world: the processes among which the texts are divided.
    """
    texts = text_features(model, inputs, world)
    if not isinstance(classes, int) and len(set(classes)) == 1:
        classes = len(classes)
    if isinstance(classes, int):
        means = texts.unflatten(0, (classes, -1)).mean(dim=1)
    else:
        means = torch.stack([of_class.mean(dim=0) for of_class in texts.split([*classes])])
    return F.normalize(means, dim=-1)


class Evaluator:
    """Evaluates a model on a list of tasks, as often as asked; texts are tokenized once.

    Args:
        model: evaluated with the weights it has when a method is called. What is frozen now must
            stay frozen.
        tasks: what to evaluate on.
        loaders: the test batches of each task, from `mulki.data.loader.batches`; for several
            processes with ``part=world.rows``.
        world: the processes that evaluate together.
        label_space: of `Answers.own`.
        tested: called with the number of images after each batch of them.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        tasks: Sequence[Task],
        loaders: Sequence[Loader],
        world: World = ALONE,
        label_space: LabelSpace = "task",
        tested: Callable[[int], None] = lambda images: None,
    ):
        self.model = model
        self.tasks = tasks
        self._loaders = loaders
        self._world = world
        self._label_space = label_space
        self._tested = tested
        self._inputs: dict[str, Tensor] = {}
        self._keys = [[class_key(prompts) for prompts in task.prompts()] for task in tasks]

    def accuracy(self, number: int) -> tuple[float, int]:
        """Top-1 accuracy in percent on task `number` (from 0), and the number of test images."""
        numbers = self._space(number, 0)
        (answers,) = self.answers(number, {n: self.classifier(n) for n in numbers}, [0])
        return answers.accuracy, len(answers.own)

    def classifier(self, number: int) -> Tensor:
        """Class weights of task `number`, [C, D], see `zero_shot_classifier`.

        Of a task of captions the features of its distinct ones.
        """
        task, model, world = self.tasks[number], self.model, self._world
        model.eval()
        texts = tested_texts(task)
        if task.name not in self._inputs:
            prompts = [prompt for of_class in texts for prompt in of_class]
            self._inputs[task.name] = text_inputs(model, prompts, world)
        return zero_shot_classifier(model, self._inputs[task.name], [*map(len, texts)], world)

    @torch.no_grad()
    def answers(
        self,
        number: int,
        classifiers: Mapping[int, Tensor],
        learned: Sequence[int],
        with_head: Mapping[int, Head] | None = None,
    ) -> list[Answers]:
        """Which test images of a task the model gets right; each image is encoded once.

        Classes of two tasks with the same prompts, see `class_key`, are one class: no image could
        tell them apart.

        Args:
            number: of the task, from 0.
            classifiers: `classifier` of this task and of those that were learned, by number; of all
                tasks if these are the label space.
            learned: numbers of learned tasks, counted from the first one. For each of them that
                covers this task, it is also classified among the classes of all these tasks.
            with_head: the head of class statistics for entries of `learned`; with it all is
                answered once more, as `Answers.head`.

        Returns:
            The answers for each entry of `learned`.

        Raises:
            InputError: features that are not finite.
        """
        self.model.eval()
        task = self.tasks[number]
        if isinstance(task, CaptionTask):
            return [self._retrieved(number, task.test, classifiers[number])] * len(learned)
        with_head = with_head or {}
        own = [self._space(number, count) for count in learned]
        seen = [range(count) if count > number else None for count in learned]
        by_texts = [(space, None) for space in (*own, *seen) if space is not None]
        by_head = [
            (space, with_head[count])
            for count, *spaces in zip(learned, own, seen, strict=True)
            for space in spaces
            if space is not None and count in with_head
        ]
        spaces = list(dict.fromkeys([*by_texts, *by_head]))
        same = [self._first_alike(space) for space, _ in spaces]
        # 0 in places of other processes, so that the sum over processes is the whole.
        right = torch.zeros(len(spaces), sum(batch_sizes(self._loaders[number])), dtype=torch.int64)
        said = torch.zeros_like(right)
        firsts = [sum(len(task.classes) for task in self.tasks[: s.start]) for s, _ in spaces]
        unsound = torch.stack([_unsound(texts) for texts in classifiers.values()]).sum()
        for scores, target, places, unsound_images in self._scores(number, classifiers, spaces):
            unsound += unsound_images
            for row, words, (space, _), first, of_space, first_alike in zip(
                right, said, spaces, firsts, scores, same, strict=True
            ):
                chosen = of_space.argmax(dim=1).cpu()
                before = self._before(number, space)
                row[places] = (first_alike[chosen] == first_alike[target + before]).long()
                words[places] = chosen + first
        *summed, count = self._world.total(
            *torch.cat([right, said]).flatten().tolist(), int(unsound), device=self.model.device
        )
        self._check_sound(number, count)
        found, classes = np.asarray(summed, dtype=np.int32).reshape(2, *right.shape)
        right_in = dict(zip(spaces, found.astype(bool), strict=True))
        said_in = dict(zip(spaces, classes, strict=True))

        def of(mine: range, among: range | None, head: Head | None) -> Answers:
            seen = None if among is None else right_in[among, head]
            return Answers(right_in[mine, head], seen, said_in[mine, head])

        return [
            replace(
                of(mine, among, None),
                head=of(mine, among, with_head[count]) if count in with_head else None,
            )
            for mine, among, count in zip(own, seen, learned, strict=True)
        ]

    def _retrieved(self, number: int, test: CaptionedImages, texts: Tensor) -> Answers:
        world, loader = self._world, self._loaders[number]
        parts, order = [], []
        for (images, _, places), count in zip(loader, batch_sizes(loader), strict=True):
            features = self.model.encode_images(images)
            parts.append(world.gather(features, count))
            order.append(world.gather(places.to(features.device), count))
            self._tested(count)
        images = torch.cat(parts)[torch.cat(order).argsort()]
        self._check_sound(number, int(_unsound(images) + _unsound(texts)))
        right = right_captions(test)
        of_images, said = ranks(images, texts, right)
        of_texts, _ = ranks(texts, images, turned(right, len(texts)))
        found = [each.numpy().astype(np.int32) for each in (of_images, of_texts, said)]
        return Answers(found[0] == 0, None, found[2], Ranks(found[0], found[1]))

    @torch.no_grad()
    def predictions(
        self,
        number: int,
        classifiers: Mapping[int, Tensor],
        spaces: Sequence[tuple[range, Head | None]],
    ) -> list[Predictions]:
        """What the model says of the test images of a task; each image is encoded once.

        The likeliest class is that of `answers`. This process has to be the only one.

        Args:
            number: of the task, from 0.
            classifiers: `classifier` of all tasks in `spaces`, by number.
            spaces: numbers of the tasks whose classes are a label space, each with this task; and
                the head that chooses among them, None for texts alone.

        Returns:
            The predictions for each entry of `spaces`.

        Raises:
            InputError: features that are not finite.
        """
        self.model.eval()
        scale = float(self.model.logit_scale)
        same = [self._first_alike(space) for space, _ in spaces]
        unsound = torch.stack([_unsound(texts) for texts in classifiers.values()]).sum()
        parts: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in spaces]
        order = []
        for scores, labels, places, unsound_images in self._scores(number, classifiers, spaces):
            unsound += unsound_images
            order.append(places)
            for part, (space, head), of_space, alike in zip(
                parts, spaces, scores, same, strict=True
            ):
                # One column for classes that are one: the best of theirs.
                best = torch.full_like(of_space.cpu(), -torch.inf)
                best.scatter_reduce_(1, alike.expand_as(best), of_space.cpu(), "amax")
                # Stable, so that the first of two that are equal wins, as argmax has it.
                order_of_classes = best.sort(dim=1, descending=True, stable=True).indices
                logits = scale * best if head is None else best
                likeliest = logits.softmax(dim=1).amax(dim=1)
                right = alike[labels + self._before(number, space)]
                # A view would keep the order of all classes.
                part.append((right, order_of_classes[:, :TOP].clone(), likeliest))
        self._check_sound(number, int(unsound))
        in_order = torch.cat(order).argsort()
        found = []
        for part, (space, _), alike in zip(parts, spaces, same, strict=True):
            target, ranked, chance = (
                torch.cat(column)[in_order].numpy() for column in zip(*part, strict=True)
            )
            kept = ranked[:, : len(alike.unique())]
            classes = [(self.tasks[i].name, name) for i in space for name in self.tasks[i].classes]
            found.append(Predictions(classes, target, kept, chance))
        return found

    def _scores(
        self,
        number: int,
        classifiers: Mapping[int, Tensor],
        spaces: Sequence[tuple[range, Head | None]],
    ) -> Iterator[tuple[list[Tensor], Tensor, Tensor, Tensor]]:
        # Of each batch: for each label space the scores [B, C], which are cosines where texts alone
        # decide; targets, places, rows that are not finite.
        for images, target, places in self._batches(number):
            features = self.model.encode_images(images)
            # A product for each task: one over all classes would round a class by its place.
            asked = {i for space, _ in spaces for i in space if self.tasks[i].classes}
            by_task = {i: features @ classifiers[i].mT for i in asked}
            scores = []
            for space, head in spaces:
                numbers = [i for i in space if i in asked]
                if head is None:
                    of_space = torch.cat([by_task[i] for i in numbers], dim=1)
                else:
                    of_space = head.scores(features, by_task, numbers)
                scores.append(of_space[: len(places)])
            yield scores, target, places, _unsound(features)

    def _before(self, number: int, space: range) -> int:
        # Classes of a label space before those of the task.
        return sum(len(self.tasks[i].classes) for i in space if i < number)

    def _check_sound(self, number: int, count: int) -> None:
        if count:
            raise InputError(
                f"task {self.tasks[number].name}: {count} features of its images and of class "
                "texts are not finite; the model has diverged: lower --lr. If it computes in "
                "float16, they may be too large for that: pass amp_bf16"
            )

    def _space(self, number: int, count: int) -> range:
        # The tasks whose classes are the label space of a task after `count` of them were learned.
        if self._label_space == "all":
            return range(len(self.tasks))
        if self._label_space == "seen" and count > number:
            return range(count)
        return range(number, number + 1)

    def _first_alike(self, space: range) -> Tensor:
        # By place among the classes of some tasks, the first place of the same class.
        firsts: dict[tuple[str, ...], int] = {}
        found: list[int] = []
        for number in space:
            keys = self._keys[number]
            begin = len(found)
            found += [firsts.get(key, place) for place, key in enumerate(keys, begin)]
            for place, key in enumerate(keys, begin):
                firsts.setdefault(key, place)
        return torch.tensor(found)

    def _batches(self, number: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        # The rows that a process repeats to fill its part of a batch are not counted.
        loader = self._loaders[number]
        for (images, target, places), count in zip(loader, batch_sizes(loader), strict=True):
            distinct = self._world.distinct(count)
            yield images, target[:distinct], places[:distinct]
            self._tested(count)


def tested_texts(task: Task) -> list[list[str]]:
    """The prompts of each class of a task, or its distinct test captions, each alone."""
    if isinstance(task, CaptionTask):
        return [[text] for text in task.test.texts()]
    return task.prompts()


def shared_classes(tasks: Sequence[Task]) -> dict[str, list[str]]:
    """Names of the tasks that have a class with the same `class_key`, by the name of the class."""
    owners: dict[tuple[str, ...], dict[str, str]] = {}
    for task in tasks:
        for name, prompts in zip(task.classes, task.prompts(), strict=True):
            owners.setdefault(class_key(prompts), {}).setdefault(task.name, name)
    return {next(iter(of.values())): list(of) for of in owners.values() if len(of) > 1}


def _unsound(features: Tensor) -> Tensor:
    # How many rows hold a NaN or an infinity.
    return (~torch.isfinite(features)).any(dim=1).sum()
