"""What one process of the tests of distribution does.

torchrun starts several of it with the name of a fault and the step it comes in, as in kill@8 (3 by
default), and the arguments of the command line after it.
"""

from __future__ import annotations

import datetime
import errno
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip.loss as open_clip_loss
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mulki.app import cli
from mulki.clip.models import VisionLanguageModel
from mulki.distributed import roll_call
from mulki.distributed.world import World
from mulki.errors import InputError
from mulki.losses import ClipLoss
from mulki.report import html
from mulki.train.config.run_config import resolve
from mulki.train.learning.class_step import Step
from mulki.train.microbatch import backward
from mulki.train.saving import recovery
from mulki.train.sequence import run
from tests.train.crafted_method import Crafted
from tests.train.distributed_runs import THEN_WAITS_S, WAITS_S
from tests.train.reference_method import OnReference

OnReference.name = "on_reference"
Crafted.name = "crafted"
# As in the test process: to draw takes longer than these runs do, to wait for the disk a part.
html.plots = lambda contents: []
os.fsync = lambda descriptor: None


class TwoTowers(nn.Module):
    """A CLIP in the small; its forward returns what a loss takes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.visual = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 6))
        self.text = nn.Linear(5, 6)
        self.logit_scale = nn.Parameter(torch.tensor([1.5]))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        return {
            "image_features": F.normalize(self.visual(images), dim=-1),
            "text_features": F.normalize(self.text(texts), dim=-1),
            "logit_scale": self.logit_scale.exp().reshape(()),
        }


def check_micro_batches(world: World) -> None:
    """DistributedDataParallel and FSDP2 around gradient caching, against one whole batch."""
    torch.manual_seed(1)
    inputs = torch.randn(12, 8), torch.randn(12, 5)
    whole = TwoTowers()
    open_clip_loss.ClipLoss()(**whole(*inputs)).backward()
    wanted = {name: p.grad for name, p in whole.named_parameters()}
    loss = ClipLoss(gather_with_grad=True, rank=world.rank, world_size=world.size)
    part = [world.part(x) for x in inputs]

    replicated = nn.parallel.DistributedDataParallel(TwoTowers())
    reduced: list[int] = []

    def count(state, bucket):  # DDP wants classes for annotations, not their names
        reduced.append(len(bucket.parameters()))
        return default_hooks.allreduce_hook(dist.group.WORLD, bucket)

    replicated.register_comm_hook(None, count)
    for micro_batch in (None, 2, 4):
        replicated.zero_grad()
        reduced.clear()
        backward(lambda out: loss(**out), (replicated, *part), micro_batch=micro_batch)
        # Each parameter's gradient travels once a step, however many micro-batches there are.
        assert sum(reduced) == len(wanted), reduced
        for name, parameter in replicated.module.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name])

    sharded = TwoTowers()
    mesh = init_device_mesh("cpu", (world.size,))
    for module in (sharded.visual, sharded.text, sharded):
        fully_shard(module, mesh=mesh)
    for micro_batch in (None, 2):
        sharded.zero_grad()
        backward(lambda out: loss(**out), (sharded, *part), micro_batch=micro_batch)
        for name, parameter in sharded.named_parameters():
            torch.testing.assert_close(parameter.grad.full_tensor(), wanted[name])


def check_runs(runs: list[tuple[str, dict[str, Any]]], world: World) -> None:
    """Each run is written by one process, and its work is divided."""
    prompts: list[int] = []
    text_inputs = VisionLanguageModel.text_inputs

    def counted(model: VisionLanguageModel, texts: Sequence[str]) -> Tensor:
        # Captions, anchors and earlier classes are more texts than classes of a task; and the
        # Fisher information is that of single images, each of which wants all texts. More than
        # three are the words by which it is seen how far the student has moved.
        if class_texts_alone and len(texts) <= 3:
            prompts.append(len(texts))
        return text_inputs(model, texts)

    VisionLanguageModel.text_inputs = counted  # type: ignore[method-assign]
    for name, options in runs:
        anchors = options.get("anchors", "vocabulary" if options["method"] == "mulki" else "none")
        captions = any(task.startswith("captions:") for task in options["tasks"])
        class_texts_alone = not (
            captions
            or anchors != "none"
            or options["method"] in ("er", "ewc")
            or {"reference", "anchors_per_step"} & options.keys()
        )
        folder = run(resolve({"name": name, **options}))
        assert (folder is None) == (world.rank != 0)
        # What an encoder draws is not the same in every process.
        assert torch.initial_seed() == world.rank
    # Of at most three class texts; none is prepared by all.
    assert max(prompts) == -(-3 // world.size)
    with pytest.raises(InputError, match="the run folder exists and is not empty"):
        run(resolve({"name": name, **options}))


def bad_image() -> None:
    raise InputError("blue/0.png: cannot be read")


def fill() -> None:
    def full(path: Path, state: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    recovery.write_state = full  # type: ignore[assignment]


def hang() -> None:
    # In code that does not come back to the interpreter, but that torchrun can end at once.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(600)


# What a process does to the others; the first process, which saves, may have a full disk.
FAULTS: dict[str, Callable[[], object]] = {
    "raise": bad_image,
    "crash": lambda: 1 // 0,
    "kill": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "hang": hang,
    "fill": fill,
}


def shorten_waits() -> None:
    """Let this process wait for the others as long as a process that hangs is given."""
    of_cpu = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert of_cpu.options._timeout == datetime.timedelta(seconds=WAITS_S), "--process-timeout"
    dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=THEN_WAITS_S))


def fail(fault: Callable[[], object], step: int, arguments: list[str]) -> None:
    """`mulki` with these arguments, where a process has a fault in one of its steps.

    It has none when torchrun starts it again.
    """
    faulty = "0" if fault is fill else "1"
    roll_call.GRACE_S = 2
    real, calls = Step.update, 0

    def update(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == step and fault is hang:
            shorten_waits()
        again = os.environ["TORCHELASTIC_RESTART_COUNT"] != "0"
        if calls == step and os.environ["RANK"] == faulty and not again:
            fault()
        real(*given)

    Step.update = update
    cli.main(arguments)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--"]
    name, _, step = words[0].partition("@")
    fail(FAULTS[name], int(step or 3), words[1:])
