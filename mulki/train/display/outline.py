"""What a run is going to do, in a few lines, before its first step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile

import torch

from mulki.clip.models.adapters import Adapters
from mulki.data import Task
from mulki.data.sequences import has_orders
from mulki.errors import counted
from mulki.methods import Method
from mulki.methods.base import WORDS
from mulki.ops import backends
from mulki.runs.metrics import ZERO_SHOT
from mulki.train.config.run_config import RunConfig
from mulki.train.config.tasks import needs_of
from mulki.train.display.progress import STEPS, TEACHERS, TEST, megabytes
from mulki.train.learning.learn import steps_of
from mulki.train.learning.memory import free_memory
from mulki.train.learning.stored_features import stored_sets
from mulki.train.learning.training_set import sample
from mulki.train.start.setup import Setup


def amounts(setup: Setup) -> dict[str, int]:
    """The work of a run from its start, by the kinds of `RunProgress`."""
    tests = sum(len(task.test) for task in setup.tasks)
    if not setup.method.trains:
        return {TEACHERS: prepared_images(setup, setup.tasks), TEST: tests}
    new = setup.tasks[setup.earlier :]
    return {
        STEPS: sum(steps_of_tasks(setup.config, new, setup.world.size)),
        TEACHERS: prepared_images(setup, new),
        TEST: tests * len(rows(setup)),
    }


def rows(setup: Setup) -> list[tuple[str, int]]:
    """The rows of results of a run: the name of each, and how many tasks its model has learned.

    A model of an earlier run has one where its weights are found, and test images of its last task.
    """
    known = {} if setup.goes_on is None else setup.goes_on.weights
    learned = enumerate(setup.tasks, start=1)
    return [
        (ZERO_SHOT, 0),
        *((t.name, n) for n, t in learned if n > setup.earlier or (n in known and len(t.test))),
    ]


def prepared_images(setup: Setup, tasks: Sequence[Task]) -> int:
    """Images encoded before the first step of these tasks, by the teachers, and after the last."""
    return sum(images_of_head(setup, t) + images_of_teachers(setup, t) for t in tasks)


def images_of_head(setup: Setup, task: Task) -> int:
    """Images that are encoded for class statistics, before a task and after it."""
    count = len(task.train) if setup.config.head and task.classes else 0
    earlier = takewhile(lambda each: each is not task, setup.tasks)
    if setup.config.head_drift and any(each.classes for each in earlier):
        count += 2 * sum(map(len, sample(task)))
    return count


def images_of_teachers(setup: Setup, task: Task) -> int:
    """Images that teachers encode before the first step of a task."""
    size, needs = len(task.train), needs_of(setup.method, task)
    reference = setup.reference_of(task) if needs.reference else None
    steps = steps_of(setup.config, size, setup.world.size)
    stored = stored_sets(setup, task, reference, steps)
    # Prototypes and the cache share a pass.
    return len(stored) + (size if needs.prototypes and stored.images is None else 0)


def steps_of_tasks(config: RunConfig, tasks: Sequence[Task], processes: int) -> list[int]:
    """Optimiser steps of each task."""
    return [steps_of(config, len(task.train), processes) for task in tasks]


def of_tasks(
    config: RunConfig, method: Method, tasks: Sequence[Task], processes: int
) -> dict[str, str]:
    """What is learned and in how many steps, by the first word of a line."""
    number, images = len(tasks), sum(len(task.train) for task in tasks)
    named = f" of {' '.join(config.tasks)}" if config.tasks else ""
    steps = "none: the start model is tested as it is"
    if method.trains:
        counts = steps_of_tasks(config, tasks, processes)
        batch, sizes = config.batch_size * processes, [len(task.train) for task in tasks]
        most = "at most " if min(sizes) < batch else ""
        steps = f"{_counts(counts)} of {most}{min(batch, max(sizes))} images"
        steps += f", {config.micro_batch} at a time" if config.micro_batch else ""
        steps += f"; {images} training images"
    order = f", order {config.order}" if has_orders(config.tasks, config.order) else ""
    return {
        "run": f"{config.method} on {counted(number, 'task')}{named}{order}, seed {config.seed}",
        "steps": steps,
    }


def plan(setup: Setup) -> list[str]:
    """Lines that say what is learned, with what, on what, and where the results go."""
    config, device = setup.config, setup.precision.device
    counts = setup.model.parameter_counts()
    new = setup.tasks[setup.earlier :]
    tasks = of_tasks(config, setup.method, new, setup.world.size)
    before = ", ".join(task.name for task in setup.tasks[: setup.earlier])
    lines = {
        "run": tasks["run"],
        "model": f"{config.model}, {millions(counts.total)} parameters, "
        f"{millions(counts.trained)} {_trained(setup.model.adapters)}",
        "goes on": f"from {config.continue_}, which has learned {before}" if before else "",
        "original": config.original or "",
        "device": f"{_device(device, setup.world.size)}, precision {setup.precision.name}"
        + (f", tests in {config.precision_eval}" if config.precision_eval else ""),
        "kernels": _kernels(device),
        "steps": tasks["steps"],
        "uses": _uses(setup),
        "memory": f"{megabytes(free_memory(device)) or 'an unknown amount'} free",
        "results": str(setup.folder.path) if setup.folder is not None else "",
    }
    return in_lines(lines)


def _uses(setup: Setup) -> str:
    # Beyond the tasks and the start model; of a vocabulary also how large it is, and whose.
    if (vocabulary := setup.vocabulary) is None:
        return ", ".join(setup.uses)
    source = setup.config.vocabulary or "ImageNet's class names"
    words = f"{counted(len(vocabulary.words), 'word')} of {source}"
    return ", ".join(words if each == WORDS else each for each in setup.uses)


def _trained(adapters: Adapters | None) -> str:
    return "train" if adapters is None else f"train, in adapters of {len(adapters)} weights"


def in_lines(texts: Mapping[str, str]) -> list[str]:
    """A line for each text that is not empty, behind its word."""
    return [f"{word:<8} {text}" for word, text in texts.items() if text]


def _counts(steps: Sequence[int]) -> str:
    same = len(set(steps)) == 1
    return f"{len(steps)} x {steps[0]}" if same else " + ".join(map(str, steps))


def _device(device: torch.device, processes: int) -> str:
    if device.type == "cuda":
        name = f"{device} ({torch.cuda.get_device_name(device)})"
    elif device.type == "cpu":
        name = f"cpu, {counted(torch.get_num_threads(), 'thread')}"
    else:
        name = str(device)
    return name if processes == 1 else f"{processes} processes, each on {name}"


def _kernels(device: torch.device) -> str:
    # Of features, which are float32 whatever the towers compute in.
    wanted = device.type, torch.float32
    here = [s for s in backends.report() if (s.device_type, s.dtype) == wanted]
    served: dict[tuple[str, str], list[str]] = {}
    for one in here:
        served.setdefault((one.who, one.reasons), []).append(one.op)
    texts = []
    for (who, reasons), ops in served.items():
        which = "all operators" if len(ops) == len(here) else ", ".join(ops)
        texts.append(f"{who} for {which}" + (f" ({reasons})" if reasons else ""))
    return "; ".join(texts) or "plain PyTorch"


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e6:.1f} M" if count >= 1e5 else str(count)
