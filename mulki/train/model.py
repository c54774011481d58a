"""From Python: `run` learns tasks, `load` gives a model that says the classes of images."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mulki.choices.options import field_name
from mulki.clip.evaluation import zero_shot_classifier
from mulki.clip.exporting.onnx import Classes
from mulki.clip.head import ClassStatistics, Head, class_key, read_statistics
from mulki.clip.models import VisionLanguageModel
from mulki.console import Console
from mulki.data import BadImage, Task
from mulki.data.captioned_shards import Joined, Loadable
from mulki.data.loader import readable_batches
from mulki.data.prompts import DEFAULT_TEMPLATES
from mulki.data.unlabelled import Pictures, find_images
from mulki.errors import InputError
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import AccuracyMatrix, Metrics, read_matrix
from mulki.train import sequence
from mulki.train.config.precision import as_tested, device_of
from mulki.train.config.run_config import RunConfig, resolve
from mulki.train.saving.checkpoints import description_of, statistics_of
from mulki.train.saving.description import Description, LearnedTask
from mulki.train.start.continuation import continued_options
from mulki.train.start.start_model import as_in_its_run, check_start, is_checkpoint, load_start

# What may stand where tasks are wanted.
Tasks = str | os.PathLike[str] | Task | Sequence[str | os.PathLike[str] | Task]
# And where images are.
Images = str | os.PathLike[str] | Image.Image | Sequence[str | os.PathLike[str] | Image.Image]


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        image: its name.
        classes: the likeliest classes, best first, [k].
        probabilities: of these, among all classes of the model, [k].
        label: the likeliest class; None where its probability is below the threshold.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    label: str | None


class Model:
    """A model and the classes among which it predicts; made by `load`.

    Attributes:
        clip: the model behind mulki's methods; `clip.clip` is that of open_clip.
        description: what its checkpoint says of itself; None of another program's.
        source: what `load` was given.
        statistics: of the classes that it has learned, of which a head is made, see
            `mulki.clip.head`; None where texts alone answer.
    """

    def __init__(
        self,
        clip: VisionLanguageModel,
        description: Description | None = None,
        source: str = "",
        pretrained: str | None = None,
        statistics: ClassStatistics | None = None,
    ):
        self.clip = clip
        self.description = description
        self.source = source
        self.statistics = statistics
        self._pretrained = pretrained
        self._tasks = () if description is None else description.tasks
        self._weights: dict[tuple[str, ...] | None, tuple[tuple[str, ...], list[Tensor]]] = {}

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes that the model has learned, those of all tasks, [C].

        Classes with the same prompts are one. Where two with other prompts have one name, the name
        of the task stands behind it.
        """
        return _labels(_distinct(self._tasks))

    def predict(
        self,
        images: Images,
        *,
        classes: Sequence[str] | None = None,
        top: int = 5,
        threshold: float = 0.0,
        batch_size: int = 256,
        workers: int = 0,
    ) -> list[Prediction]:
        """The classes of images, most likely first.

        Args:
            images: a picture of PIL, the path of an image, a folder or a tar shard, or a list of
                these, see `mulki.data.unlabelled.find_images`.
            classes: names, in place of those that the model has learned. One that it has learned
                has the prompts of its task, another "a photo of a {}.".
            top: how many classes are told of each image, at least 1.
            threshold: least probability of a label.
            batch_size: images encoded at a time.
            workers: processes that load images.

        Returns:
            A prediction for each image, in their order.

        Raises:
            InputError: no such file, no image, no class, or another argument than is wanted.
            BadImage: an image cannot be decoded.
        """
        given = self.predictions(
            _found(images),
            classes=classes,
            top=top,
            threshold=threshold,
            batch_size=batch_size,
            workers=workers,
        )
        found = []
        for each in given:
            if isinstance(each, BadImage):
                raise each
            found.append(each)
        return found

    @torch.no_grad()
    def predictions(
        self,
        images: Loadable,
        *,
        classes: Sequence[str] | None = None,
        top: int = 5,
        threshold: float = 0.0,
        batch_size: int = 256,
        workers: int = 0,
        told: Callable[[int, int], None] = lambda done, total: None,
    ) -> Iterator[Prediction | BadImage]:
        """`predict`, one by one, with the error in place of an image that cannot be decoded.

        Args:
            images: those of `find_images`.
            told: called with the number of images so far, and of all.
        """
        _check(classes, top, threshold, batch_size)
        names, weights = self._texts(None if classes is None else tuple(classes))
        count, head = min(top, len(names)), self._head() if classes is None else None
        done = 0
        for features, batch in self._encoded(images, batch_size, workers):
            rows: Iterator[tuple[list[float], list[int]]] = iter(())
            if features is not None:
                # A product for each task, as when it is tested: one of all would round differently.
                cosines = {number: features @ of.mT for number, of in enumerate(weights)}
                if head is None:
                    logits = self.clip.logit_scale * torch.cat([*cosines.values()], dim=1)
                else:
                    logits = head.scores(features, cosines, list(cosines))
                # By logits: probabilities that are rounded to 0 have no order.
                best = logits.topk(count, dim=1).indices
                chances_of = logits.softmax(dim=1).gather(1, best)
                rows = zip(chances_of.tolist(), best.tolist(), strict=True)
            for number, image in enumerate(batch, start=done):
                if isinstance(image, BadImage):
                    yield image
                    continue
                chances, places = next(rows)
                said = tuple(names[place] for place in places)
                label = said[0] if chances[0] >= threshold else None
                yield Prediction(images.name(number), said, tuple(chances), label)
            done += len(batch)
            told(done, len(images))

    @torch.no_grad()
    def layer(self) -> Classes:
        """The classes as one layer on image features, whose softmax are those of `predict`.

        Raises:
            InputError: the model says no classes, or has class statistics of some of them alone.
        """
        names, weights = self._texts(None)
        head, scale = self._head(), self.clip.logit_scale
        linear = [scale * of for of in weights]
        bias = [of.new_zeros(len(of)) for of in weights]
        if head is not None:
            if lacking := [number for number in range(len(weights)) if number not in head]:
                task = _distinct(self._tasks)[lacking[0]].name
                raise InputError(
                    f"{self.source}: no class statistics of task {task}, but of others, so it is "
                    "no single layer; remove the class statistics to go by texts alone"
                )
            layers = [head.layer(number) for number in range(len(weights))]
            linear = [one + two for one, (two, _) in zip(linear, layers, strict=True)]
            bias = [of for _, of in layers]
        return Classes(names, torch.cat(linear), torch.cat(bias))

    @torch.no_grad()
    def encode_images(self, images: Images, *, batch_size: int = 256, workers: int = 0) -> Tensor:
        """L2-normalised float32 features [n, D] of images, on the CPU.

        Args:
            images, batch_size, workers: as of `predict`.

        Raises:
            InputError, BadImage: as `predict`.
        """
        parts = []
        for features, batch in self._encoded(_found(images), batch_size, workers):
            for image in batch:
                if isinstance(image, BadImage):
                    raise image
            assert features is not None
            parts.append(features.cpu())
        return torch.cat(parts)

    def learn(self, tasks: Tasks, **options: Any) -> Run:
        """Learn more tasks, see `run`. This model stays as it is.

        Args:
            tasks: as of `run`.
            options: as of `run`; those left out are of the run that made this model.

        Returns:
            The run; its `model` has learned the tasks too.
        """
        if self.description is not None and self.description.tasks:
            return run(tasks, continue_from=self.source, **options)
        return run(tasks, model=self.source, pretrained=self._pretrained, **options)

    def _encoded(
        self, images: Loadable, batch_size: int, workers: int
    ) -> Iterator[tuple[Tensor | None, list[Tensor | BadImage]]]:
        # Of each batch the features of its readable images [b, D], None without one, and the batch.
        for batch in readable_batches(images, self.clip.preprocess, batch_size, workers):
            readable = [image for image in batch if isinstance(image, Tensor)]
            features = self.clip.encode_images(torch.stack(readable)) if readable else None
            yield features, batch

    def _head(self) -> Head | None:
        if self.statistics is None or self.description is None:
            return None
        recipe, scale = self.description.recipe, float(self.clip.logit_scale)
        return Head(
            self.statistics,
            _distinct(self._tasks),
            scale,
            shrinkage=float(recipe.get("head_shrinkage", RunConfig.head_shrinkage)),
            weight=float(recipe.get("head_weight", RunConfig.head_weight)),
            device=self.clip.device,
        )

    def _texts(self, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[Tensor]]:
        # Names of classes, and the features of their texts, [C, D] in parts.
        if classes not in self._weights:
            tasks = self._tasks if classes is None else self._tasks_of(classes)
            if not any(task.classes for task in tasks):
                raise InputError(
                    "classes: the model says none; pass classes=, or --classes FILE with a name in "
                    "each line"
                )
            distinct = _distinct(tasks)
            weights = []
            for task in distinct:
                prompts = task.prompts()
                inputs = self.clip.text_inputs([text for of_class in prompts for text in of_class])
                weights.append(zero_shot_classifier(self.clip, inputs, [*map(len, prompts)]))
            self._weights[classes] = _labels(distinct), weights
        return self._weights[classes]

    def _tasks_of(self, classes: Sequence[str]) -> list[LearnedTask]:
        learned = {
            name: (task.templates, task.texts[place] if task.texts else ())
            for task in self._tasks
            for place, name in enumerate(task.classes)
        }
        by_templates: dict[tuple[str, ...], dict[str, tuple[str, ...]]] = {}
        for name in classes:
            templates, texts = learned.get(name, (DEFAULT_TEMPLATES, ()))
            by_templates.setdefault(templates, {})[name] = texts
        return [
            LearnedTask("classes", tuple(of), templates, tuple(of.values()))
            for templates, of in by_templates.items()
        ]


def load(
    path: str | os.PathLike[str],
    *,
    pretrained: str | None = None,
    device: str = "auto",
    precision: str | None = None,
    precision_eval: str | None = None,
    head: bool = True,
) -> Model:
    """Load a model, with the classes that it has learned.

    Args:
        path: the folder of a run, of which the last model is taken; a checkpoint, as
            ``checkpoints/latest`` or ``checkpoints/task_01_birds.safetensors``; or what ``mulki run
            --model`` takes besides.
        pretrained: as of ``mulki run``, of a model by its name.
        device: "auto", "cpu", "cuda", "cuda:1", ...
        precision: of the weights, as of ``mulki run``; by default that of the run, else "fp32".
        precision_eval: in which images and texts are encoded, likewise; by default that of the
            run, else that of the weights.
        head: whether the head of class statistics that lie beside the checkpoint answers, where
            there are any; False for texts alone.

    Raises:
        InputError: it cannot be loaded.
    """
    name = _place("path", path)
    said = description_of(Path(name)) if is_checkpoint(name) else None
    recipe = {} if said is None else said.recipe
    wanted: dict[str, Any] = {
        "lock_text": recipe.get("lock_text", False),
        "lock_image": recipe.get("lock_image", False),
        "precision": precision or recipe.get("precision", "fp32"),
        "precision_eval": precision_eval or recipe.get("precision_eval"),
    }
    config = resolve({**wanted, "model": name, "pretrained": pretrained, "device": device}).run
    check_start(config)
    model = load_start(name, config.pretrained, device=device_of(config.device))
    as_in_its_run(model, name, config)
    model = as_tested(model, config.precision_eval)
    file = statistics_of(Path(name))
    statistics = read_statistics(file) if head and said is not None and file.is_file() else None
    return Model(model, said, name, config.pretrained, statistics)


class Run:
    """A finished run, as `run` returns it.

    Attributes:
        folder: of the run. In all processes of torchrun but the first it is None, and so there are
            neither results nor a model.
    """

    def __init__(self, folder: RunFolder | None):
        self.folder = folder

    @property
    def path(self) -> Path:
        """The folder with all results, ``report.html`` among them."""
        if self.folder is None:
            raise InputError("run: the first process of torchrun alone has the results")
        return self.folder.path

    @property
    def results(self) -> AccuracyMatrix:
        """Accuracies in percent: a row for each learned task, a column for each test set."""
        return read_matrix(self.path / "matrix.csv")

    @property
    def metrics(self) -> Metrics:
        """Transfer, Average, Last, forgetting and BWT, see `mulki.runs.metrics`."""
        return self.results.metrics()

    @cached_property
    def model(self) -> Model:
        """The model after the last task, loaded on first use."""
        return load(self.path)


def run(
    tasks: Tasks,
    *,
    model: str | os.PathLike[str] | None = None,
    continue_from: str | os.PathLike[str] | None = None,
    show: bool = False,
    **options: Any,
) -> Run:
    """Learn tasks one after another, as ``mulki run`` does.

    Args:
        tasks: one or several, in their order: a sequence such as "embedded", paths of folders and
            CSV files, or `mulki.data.Task` objects; not both kinds.
        model: the start model, see ``mulki run --model``; "mulki-mini" if left out.
        continue_from: the folder of a finished run, or a checkpoint of one, to go on from, see
            ``mulki run --continue``.
        show: draw the progress on standard error.
        options: all others of ``mulki run`` and of the method, with underscores: ``lr=1e-5``.

    Raises:
        InputError: what the command refuses.
        Stopped: SIGINT, SIGTERM or SIGHUP came.
    """
    words, objects = _divided(tasks)
    given: dict[str, Any] = {
        field_name(name): os.fspath(value) if isinstance(value, os.PathLike) else value
        for name, value in options.items()
    }
    given["tasks"] = words
    if model is not None:
        given["model"] = _place("model", model)
    if continue_from is not None:
        given = continued_options(Path(_place("continue_from", continue_from)), given)
    console = Console(stderr=True) if show else None
    return Run(sequence.run(resolve(given), console, tasks=objects))


def _divided(tasks: Tasks) -> tuple[list[str], list[Task] | None]:
    # Words, or objects.
    given = _list_of("tasks", tasks, (str, os.PathLike, Task), "words, paths or Task objects")
    objects = [each for each in given if isinstance(each, Task)]
    if len(objects) not in (0, len(given)):
        raise InputError(
            f"tasks: got {len(given)}, {len(objects)} of them Task objects; wanted all of one kind"
        )
    return [os.fspath(each) for each in given if not isinstance(each, Task)], objects or None


def _found(images: Images) -> Loadable:
    kinds = (str, os.PathLike, Image.Image)
    given = _list_of("images", images, kinds, "paths or pictures of PIL (Image.fromarray)")
    parts: list[Loadable] = [
        Pictures([each], first=place) if isinstance(each, Image.Image) else find_images([each])
        for place, each in enumerate(given)
    ]
    return Joined(tuple(parts))


def _list_of(name: str, given: Any, kinds: tuple[type, ...], wanted: str) -> list[Any]:
    # One value stands for a list of it.
    try:
        found = [given] if isinstance(given, kinds) else list(given)
    except TypeError:
        found = [given]
    if not found:
        raise InputError(f"{name}: got an empty list, wanted {wanted}")
    for each in found:
        if not isinstance(each, kinds):
            raise InputError(f"{name}: got {type(each).__name__}, wanted {wanted}")
    return found


def _place(name: str, value: Any) -> str:
    if not isinstance(value, (str, os.PathLike)):
        raise InputError(f"{name}: got {type(value).__name__}, wanted a name or a path")
    return str(os.fspath(value))


def _check(classes: Any, top: Any, threshold: Any, batch_size: Any) -> None:
    if isinstance(classes, str):
        raise InputError(f"classes: got {classes!r}, wanted a list of names; write [{classes!r}]")
    if classes is not None and not [*classes]:
        raise InputError("classes: got an empty list, wanted names")
    for each in classes or ():
        if not isinstance(each, str) or not each.strip():
            raise InputError(f"classes: got {each!r}, wanted names")
    for name, value in (("top", top), ("batch_size", batch_size)):
        if not isinstance(value, Integral) or value < 1:
            raise InputError(f"{name}: got {value!r}, wanted a whole number of at least 1")
    if not isinstance(threshold, Real) or not 0 <= float(threshold) <= 1:
        raise InputError(f"threshold: got {threshold!r}, wanted a number from 0 to 1")


def _distinct(tasks: Sequence[LearnedTask]) -> list[LearnedTask]:
    # Without the classes of earlier ones.
    seen: set[tuple[str, ...]] = set()
    found = []
    for task in tasks:
        keys = list(map(class_key, task.prompts()))
        kept = [place for place, key in enumerate(keys) if key not in seen]
        seen.update(keys)
        if kept:
            names = tuple(task.classes[place] for place in kept)
            texts = tuple(task.texts[place] for place in kept) if task.texts else ()
            found.append(LearnedTask(task.name, names, task.templates, texts))
    return found


def _labels(tasks: Sequence[LearnedTask]) -> tuple[str, ...]:
    names = [(name, task.name) for task in tasks for name in task.classes]
    often = Counter(name for name, _ in names)
    return tuple(name if often[name] == 1 else f"{name} ({task})" for name, task in names)
