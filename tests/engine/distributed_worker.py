"""What one process of the tests of distribution does; torchrun starts several of it.

Reads a JSON list of [name of the run, options], each a run of `mulki.engine.runner.run`; or, after
the word fail, takes the arguments of the command line.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from mulki import cli
from mulki.engine import learn
from mulki.engine.config import resolve
from mulki.engine.distributed import World
from mulki.engine.runner import run
from mulki.errors import InputError


def check_rows(world: World) -> None:
    """Every row is somebody's, in order, and gradients are those of one process."""
    for count in (1, 2, 3, 5, 8):
        whole = torch.arange(3.0 * count).view(count, 3) + 1
        weight = nn.Parameter(torch.tensor([2.0, -1.0, 0.5]))
        direct = nn.Parameter(torch.tensor(3.0))
        encoded = world.part(whole) * weight
        gathered = world.gather(encoded, count)
        assert gathered.shape == whole.shape
        assert torch.equal(gathered.detach(), whole * weight.detach())
        assert sum(world.total(world.own(count), device=torch.device("cpu"))) == count
        loss = (gathered * torch.arange(1.0, count + 1).unsqueeze(1)).square().sum() * direct
        loss.backward()
        world.average([weight, direct])
        ours = [weight.grad, direct.grad]
        weight.grad = direct.grad = None
        rows = torch.arange(1.0, count + 1).unsqueeze(1)
        ((whole * weight * rows).square().sum() * direct).backward()
        for gradient, wanted in zip(ours, (weight.grad, direct.grad), strict=True):
            torch.testing.assert_close(gradient, wanted)
    assert world.smallest(world.rank + 4, torch.device("cpu")) == 4


def main(runs: list[tuple[str, dict[str, Any]]]) -> None:
    dist.init_process_group("gloo")
    check_rows(World(dist.get_rank(), dist.get_world_size()))
    for name, options in runs:
        folder = run(resolve({"name": name, **options}))
        assert (folder is None) == (dist.get_rank() != 0)
    dist.destroy_process_group()


def fail(arguments: list[str]) -> None:
    """`mulki` with these arguments, where the second process fails in its third step."""
    real, calls = learn._descend, 0

    def descend(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 3 and os.environ["RANK"] == "1":
            raise InputError("blue/0.png: cannot be read")
        real(*given)

    learn._descend = descend
    cli.main(arguments)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--"]
    if words[0] == "fail":
        fail(words[1:])
    else:
        main(json.loads(Path(words[0]).read_text()))
