"""A head of class statistics: one linear layer over the features of one ordinary CLIP.

    score_c = s u w_c + tau (u P mu_c - mu_c P mu_c / 2)
    P = ((1 - r) S + r tr(S) / D I)^-1,   S = sum_c sum_i (x_ci - mu_c) (x_ci - mu_c)^T / (n - C)

with u the feature of an image [D], w_c the class text, s the logit scale, mu_c the mean of the
features x_ci of the training images of class c, C classes with n images in all, and r the
shrinkage. The first term is what texts alone say. The second one, times tau, is the log-likelihood
of linear discriminant analysis, up to what all classes have in common (Hastie, Tibshirani and
Friedman, The Elements of Statistical Learning, section 4.3). Nothing is trained and no image is
kept: a mean for each class, and one matrix for all.

Statistics are of the model after the task in which a class was learned; means can be moved along
with the features of later tasks (`ClassStatistics.shifted`). A class of several tasks, see
`class_key`, has the mean and the scatter of all its images. Where classes without statistics
are in the label space too, the texts decide whether the answer is a class that has them, and the
head which of these it is:

    score_c = max_k s u w_k + (score_c - max_k score_k)   for c and k with statistics

So an image of a class that was not learned yet is never lost to the head. What it wins or loses
from is the choice among the learned classes alone.

Source: our choice, by measurement (docs/presets.md). Related: the ridge regression of RAIL (Xu et
al., NeurIPS 2024), and LDA on features of a frozen model (Hayes and Kanan, CVPR Workshops 2020).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mulki.clip.tensor_files import load_tensors, save_tensors
from mulki.data.caption_task import same_text
from mulki.data.task import Task
from mulki.errors import InputError

_FORMAT = "class statistics 1"
# sigma of the shift of means, for features of unit length; SDC's code has it for such.
_BANDWIDTH = 0.3
# A variance below this is rounding: features have length 1.
_ROUNDING = 1e-12


def class_key(prompts: Sequence[str]) -> tuple[str, ...]:
    """What the prompts of one class share in two tasks: they are equal but for `same_text`."""
    return tuple(map(same_text, prompts))


class Prompted(Protocol):
    """A task, or what is known of one: its classes by their prompts."""

    def prompts(self) -> list[list[str]]:
        """[C][T]."""


@dataclass(frozen=True, eq=False)
class TaskMeans:
    """The class means of one task.

    Attributes:
        task: its name.
        classes: class names, [C].
        prompts: the prompts of each class, [C][T].
        means: [C, D] float32, means of the features, or what they were moved to; no unit rows.
        counts: [C] int64, images of each class.
    """

    task: str
    classes: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    means: Tensor
    counts: Tensor


@dataclass(frozen=True, eq=False)
class ClassStatistics:
    """What is kept of the training images of the tasks learned so far; on the CPU.

    Attributes:
        tasks: in the order learned.
        scatter: [D, D] float32, sum over all images of (x - mu)(x - mu)^T, mu the mean of their
            class; None where there is no task.
    """

    tasks: tuple[TaskMeans, ...] = ()
    scatter: Tensor | None = None

    def with_task(self, means: TaskMeans, scatter: Tensor) -> ClassStatistics:
        """These and those of one more task."""
        whole = scatter if self.scatter is None else self.scatter + scatter
        return ClassStatistics((*self.tasks, means), whole)

    def shifted(self, before: Tensor, after: Tensor) -> ClassStatistics:
        """These, each mean moved as the images near it moved while a later task was learned.

            mu_c + sum_i a_ci (y_i - x_i) / sum_i a_ci,   a_ci = exp(-|x_i - mu_c|^2 / (2 sigma^2))

        The scatter stays. Source: semantic drift compensation (SDC, Yu et al., CVPR 2020), with
        sigma = 0.3.

        Args:
            before, after: x and y, [N, D] features of the same images by the model before the task
                and after it.
        """

        def moved(means: Tensor) -> Tensor:
            near = (-torch.cdist(means, before).square() / (2 * _BANDWIDTH**2)).softmax(dim=1)
            return means + near @ (after - before)

        tasks = tuple(replace(each, means=moved(each.means)) for each in self.tasks)
        return ClassStatistics(tasks, self.scatter)

    def precision(self, shrinkage: float) -> Tensor:
        """P [D, D] in float64; zeros where the images of each class are alike: texts alone decide.

        Args:
            shrinkage: r, in (0, 1].
        """
        places, _, scatter = self._classes()
        images = sum(int(each.counts.sum()) for each in self.tasks)
        covariance = scatter / max(images - len(places), 1)
        average = covariance.diagonal().mean()
        if average < _ROUNDING:
            return torch.zeros_like(covariance)
        identity = torch.eye(len(covariance), dtype=covariance.dtype)
        return torch.linalg.inv((1 - shrinkage) * covariance + shrinkage * average * identity)

    def means_of(self, tasks: Sequence[Prompted]) -> dict[int, Tensor]:
        """Class means [C, D] of those tasks all of whose classes have one, by the task's number.

        Args:
            tasks: a class is known by its prompts, see `class_key`.
        """
        places, means, _ = self._classes()
        found = {}
        for number, task in enumerate(tasks):
            rows = [places.get(class_key(prompts)) for prompts in task.prompts()]
            there = [row for row in rows if row is not None]
            if there and len(there) == len(rows):
                found[number] = means[there].float()
        return found

    def _classes(self) -> tuple[dict[tuple[str, ...], int], Tensor, Tensor]:
        # The place of each class, and as if its images were all of one task: means [C, D] and
        # scatter [D, D] in float64.
        assert self.scatter is not None
        places: dict[tuple[str, ...], int] = {}
        keys = [class_key(prompts) for each in self.tasks for prompts in each.prompts]
        rows = torch.tensor([places.setdefault(key, len(places)) for key in keys])
        of_task = torch.cat([each.means for each in self.tasks]).double()
        counts = torch.cat([each.counts for each in self.tasks]).double().unsqueeze(1)
        share = counts / counts.new_zeros(len(places), 1).index_add_(0, rows, counts)[rows]
        means = of_task.new_zeros(len(places), of_task.shape[1])
        means.index_add_(0, rows, share * of_task)
        between = of_task - means[rows]
        return places, means, self.scatter.double() + (counts * between).T @ between

    def state(self) -> dict[str, Any]:
        """It as nested lists, texts and tensors."""
        names = [
            {
                "task": each.task,
                "classes": list(each.classes),
                "prompts": [*map(list, each.prompts)],
            }
            for each in self.tasks
        ]
        if self.scatter is None:
            return {"tasks": names}
        return {
            "tasks": names,
            "means": torch.cat([each.means for each in self.tasks]),
            "counts": torch.cat([each.counts for each in self.tasks]),
            "scatter": self.scatter,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any]) -> ClassStatistics:
        """What `state` was called on.

        Raises:
            KeyError, TypeError, ValueError, RuntimeError: it is something else.
        """
        if not state["tasks"]:
            return cls()
        sizes = [len(each["classes"]) for each in state["tasks"]]
        parts = (state[name].split(sizes) for name in ("means", "counts"))
        tasks = tuple(
            TaskMeans(
                str(names["task"]),
                tuple(names["classes"]),
                tuple(map(tuple, names["prompts"])),
                *of_task,
            )
            for names, *of_task in zip(state["tasks"], *parts, strict=True)
        )
        scatter = state["scatter"]
        for each in tasks:
            if (
                len(each.prompts) != len(each.classes)
                or scatter.shape != (each.means.shape[1],) * 2
            ):
                raise ValueError(f"the sizes of task {each.task} do not agree")
            if not each.means.isfinite().all() or not scatter.isfinite().all():
                raise ValueError("values that are not finite")
            if each.counts.min() < 1:
                raise ValueError(f"a class of task {each.task} without an image")
        return cls(tasks, scatter)


class Moments:
    """Sums over the features of a task's training images, batch by batch, in float64.

    Args:
        num_classes: C.
    """

    def __init__(self, num_classes: int):
        self._num_classes = num_classes
        self._sums: Tensor | None = None

    def add(self, features: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            features: [B, D] image features, on any device.
            target: [B] int64 in [0, C).
        """
        x, y = features.cpu().double(), target.cpu()
        if self._sums is None:
            self._sums = x.new_zeros(self._num_classes, x.shape[1])
            self._products = x.new_zeros(x.shape[1], x.shape[1])
            self._counts = torch.zeros(self._num_classes, dtype=torch.int64)
        self._sums.index_add_(0, y, x)
        self._products += x.T @ x
        self._counts += torch.bincount(y, minlength=self._num_classes)

    def of(self, task: Task) -> tuple[TaskMeans, Tensor]:
        """Means and scatter of the task whose images were counted; each class has an image."""
        assert self._sums is not None
        means = self._sums / self._counts.unsqueeze(1)
        scatter = self._products - means.T @ self._sums
        prompts = tuple(map(tuple, task.prompts()))
        found = TaskMeans(task.name, task.classes, prompts, means.float(), self._counts)
        return found, scatter.float()


class Head:
    """The score over the classes of a list of tasks, some of which have statistics.

    Args:
        statistics: of at least one task.
        tasks: in whose numbers the methods speak.
        scale: s.
        shrinkage: r.
        weight: tau.
        device: of the features.
    """

    def __init__(
        self,
        statistics: ClassStatistics,
        tasks: Sequence[Prompted],
        scale: float,
        shrinkage: float,
        weight: float,
        device: torch.device | str = "cpu",
    ):
        self._scale = scale
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        precision = statistics.precision(shrinkage)
        for number, means in statistics.means_of(tasks).items():
            linear = weight * means.double() @ precision
            bias = -(linear * means).sum(dim=1) / 2
            self._layers[number] = linear.float().to(device), bias.float().to(device)

    def layer(self, number: int) -> tuple[Tensor, Tensor]:
        """What is added to the scores by texts of a task: weight [C, D] and bias [C]."""
        return self._layers[number]

    def __contains__(self, number: int) -> bool:
        return number in self._layers

    def scores(
        self, features: Tensor, cosines: Mapping[int, Tensor], numbers: Sequence[int]
    ) -> Tensor:
        """Scores [B, C] over the classes of some tasks; see the module.

        Args:
            features: [B, D] of images.
            cosines: [B, C_i] of the features and the class texts of each task, by its number.
            numbers: of the tasks, in the order of the columns.

        Raises:
            InputError: the statistics are of another model.
        """
        texts, whole, learned = [], [], []
        for number in numbers:
            of_texts = self._scale * cosines[number].float()
            score = of_texts
            if number in self:
                linear, bias = self._layers[number]
                if linear.shape[1] != features.shape[1]:
                    raise InputError(
                        f"class statistics: of {linear.shape[1]} features, but the model has "
                        f"{features.shape[1]}, so they are another model's; restore the file "
                        "beside the checkpoint, or pass --no-head"
                    )
                score = of_texts + torch.addmm(bias, features.float(), linear.mT)
            texts.append(of_texts)
            whole.append(score)
            learned += [number in self] * of_texts.shape[1]
        by_texts, by_head = torch.cat(texts, dim=1), torch.cat(whole, dim=1)
        if all(learned) or not any(learned):
            return by_head
        columns = torch.tensor(learned, device=by_head.device)
        best, best_text = (
            of.masked_fill(~columns, -torch.inf).amax(dim=1, keepdim=True)
            for of in (by_head, by_texts)
        )
        return torch.where(columns, by_head - best + best_text, by_texts)


def write_statistics(path: Path, statistics: ClassStatistics) -> None:
    """Write the statistics of at least one task to one safetensors file.

    Its tensors are means [C, D], counts [C] and scatter [D, D], over all tasks; its metadata has
    the names of tasks and classes, and the prompts.
    """
    state = statistics.state()
    names = json.dumps(state.pop("tasks"))
    save_tensors(path, state, {"format": _FORMAT, "tasks": names})


def read_statistics(path: Path) -> ClassStatistics:
    """What `write_statistics` wrote.

    Raises:
        InputError: it cannot be read, or is something else.
    """
    tensors, metadata = load_tensors(path)
    try:
        if metadata["format"] != _FORMAT:
            raise ValueError(f"format {metadata['format']}")
        return ClassStatistics.of_state({"tasks": json.loads(metadata["tasks"]), **tensors})
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"{path}: not class statistics that this version reads ({type(error).__name__}: "
            f"{error}); restore the file, or remove it to go by texts alone"
        ) from None
