"""What a checkpoint says of itself: what it learned, by which recipe, from which model.

The metadata of its weights hold that as JSON, so that no other file can be lost or disagree. A
model card in the folder says it to a person.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mulki.data.prompts import filled
from mulki.errors import InputError

#: In the metadata of a safetensors file.
KEY = "mulki"
#: The model card in the folder of a checkpoint.
CARD = "README.md"
# Options that say where a run writes, what it shows, and how its processes share the work. The
# recipe is without them.
_OF_THE_PLACE = (
    *("logs", "name", "workers", "device", "report_to", "process_timeout", "log_every_n_steps"),
    *("save_every", "save_checkpoints", "continue", "teacher_cache", "fsdp"),
)


@dataclass(frozen=True)
class LearnedTask:
    """A task that a model has learned.

    Attributes:
        name: of the task.
        classes: their names, [C]; none of a task of captions.
        templates: prompts, each with one `{}` for the class name.
        texts: more prompts of each class, [C]; empty for none.
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...] = ()

    def prompts(self) -> list[list[str]]:
        """As `mulki.data.task.Task.prompts`."""
        return filled(self.classes, self.templates, self.texts)


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself.

    Attributes:
        tasks: what the model has learned, in the order learned.
        recipe: the options of the run, by name, without those of the machine.
        weights: SHA-256 of the weights that the first of these tasks began with.
        figures: accuracy in percent by test set, of the model as it is, in the run's label space.
        earlier: how many of the tasks an earlier run has learned, the first ones.
        before: of each earlier run that it goes on from, how many tasks were learned at its end,
            and its recipe.
    """

    tasks: tuple[LearnedTask, ...]
    recipe: Mapping[str, Any]
    weights: str
    figures: Mapping[str, float]
    earlier: int = 0
    before: tuple[tuple[int, Mapping[str, Any]], ...] = ()

    @property
    def history(self) -> tuple[tuple[int, Mapping[str, Any]], ...]:
        """`before` of a run that goes on from this one."""
        return (*self.before, (len(self.tasks), self.recipe))

    def to_metadata(self) -> dict[str, str]:
        """As the metadata of a safetensors file."""
        return {KEY: json.dumps(asdict(self), sort_keys=True)}

    def card(self, *, moves: bool = True) -> str:
        """The model card, as Markdown.

        Args:
            moves: whether open_clip finds all of the model in another folder, too.
        """
        rows = [
            f"| {_cell(task.name)} | {len(task.classes) or 'captions'} | "
            f"{_percent(self.figures.get(task.name))} |"
            for task in self.tasks
        ]
        others = [name for name in self.figures if name not in {t.name for t in self.tasks}]
        not_learned = ", ".join(f"{n} {_percent(self.figures[n])}" for n in others)
        classes = [f"- {t.name}: {', '.join(t.classes)}" for t in self.tasks if t.classes]
        return _CARD.format(
            method=self.recipe.get("method"),
            start=_start(self.recipe),
            weights=self.weights,
            rows="\n".join(rows),
            not_learned=f"\nNot learned: {not_learned}.\n" if others else "",
            classes="\n".join(classes) or "None: it learned captions.",
            iterations=_length(self.recipe),
            lr=self.recipe.get("lr"),
            batch_size=self.recipe.get("batch_size"),
            stays="" if moves else _STAYS,
        )


def described(text: str, where: str) -> Description:
    """A description from the metadata of a file.

    Raises:
        InputError: it is none; the message begins with `where`.
    """
    try:
        found = json.loads(text)
        tasks = [
            LearnedTask(
                str(of["name"]),
                _texts(of["classes"]),
                _texts(of["templates"]),
                tuple(map(_texts, of.get("texts", ()))),
            )
            for of in found["tasks"]
        ]
        figures = {str(name): float(value) for name, value in found["figures"].items()}
        return Description(
            tuple(tasks),
            dict(found["recipe"]),
            str(found["weights"]),
            figures,
            int(found.get("earlier", 0)),
            tuple((int(count), dict(recipe)) for count, recipe in found.get("before", ())),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(
            f"{where}: what it says of itself is not what this version of mulki writes; use the "
            "version that wrote it"
        ) from None


def recipe_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run by name, without those of its machine."""
    return {name: value for name, value in options.items() if name not in _OF_THE_PLACE}


def _texts(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(map(str, values))


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} %"


def _start(recipe: Mapping[str, Any]) -> str:
    names = ("original", "original_pretrained") if recipe.get("original") else None
    model, pretrained = (recipe.get(name) for name in names or ("model", "pretrained"))
    return f"`{model}`" + (f" with the weights `{pretrained}`" if pretrained else "")


def _length(recipe: Mapping[str, Any]) -> str:
    epochs = recipe.get("epochs")
    return f"{recipe.get('iterations')} steps" if epochs is None else f"{epochs:g} epochs"


_STAYS = """
If this folder was moved, open_clip alone does not find all of the model; then
`mulki.load("THIS_FOLDER").clip.clip` is that of open_clip.
"""
_CARD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags: [clip, continual-learning, mulki]
license: other  # that of the start model and of the images; mulki does not know them
---
# A CLIP model that has learned

It began as {start} and learned the tasks below, one after another, with the program mulki and its
method `{method}`.

| task | classes | accuracy on its test images |
|---|---|---|
{rows}
{not_learned}
## How to load it

```python
import mulki
model = mulki.load("THIS_FOLDER")
print(model.predict("image.jpg", top=3))
```

or, as an ordinary model of open_clip,

```python
import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:THIS_FOLDER")
tokenizer = open_clip.get_tokenizer("local-dir:THIS_FOLDER")
```
{stays}
`mulki predict THIS_FOLDER IMAGES` says the classes of images,
`mulki run NEW --continue THIS_FOLDER` teaches it another task.

## Classes

{classes}

## How it was made

{iterations} a task, {batch_size} images a step in each process, learning rate {lr}. The weights
that it began with have the SHA-256 `{weights}`. All options, class names and prompts are in the
metadata of `open_clip_model.safetensors`, as JSON under the key `mulki`.
"""
