"""From which size on the Triton kernels win on this machine's GPU.

`mulki doctor --kernels` measures it and writes a file of the folder MULKI_CACHE_DIR (default
~/.cache/mulki). The file holds for one kind of GPU and for the versions of torch, Triton and mulki
that it names. Without one nothing has been seen to win.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import re
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mulki import __version__

#: By operator and dtype: the least logits (N times P) of calls that win, or why none does.
Wins = dict[str, dict[str, "int | str"]]

REMEDY = "`mulki doctor --kernels` measures float32 and bfloat16"
_MOST_BYTES = 1 << 16  # of a file that is read
# What `share` has taken in place of the files here.
_shared: Wins | None = None


def least(op: str, device_type: str, dtype: torch.dtype) -> tuple[float, str]:
    """From how many logits on the Triton kernel wins; where it never does, infinity and why."""
    found = (_read(device_type) if _shared is None else _shared).get(op, {})
    value = found.get(str(dtype).removeprefix("torch."), f"has not been measured here: {REMEDY}")
    return (math.inf, value) if isinstance(value, str) else (value, "")


def measured_on(device_type: str) -> dict[str, str]:
    """What a measurement is of: GPU and versions. GPUs of several kinds are never measured."""
    try:
        triton = str(importlib.import_module("triton").__version__)
    except ImportError:
        triton = "none"
    versions = {"torch": torch.__version__, "triton": triton, "mulki": __version__}
    return {"card": " and ".join(cards(device_type)), **versions}


def cards(device_type: str) -> list[str]:
    """The kinds of GPUs that this process sees."""
    if device_type not in ("cuda", "xpu"):
        return ["Triton's interpreter"]
    gpus = getattr(torch, device_type)
    return sorted({gpus.get_device_name(i) for i in range(gpus.device_count())})


def path_of(card: str) -> Path:
    """The file of a kind of GPU.

    Raises:
        RuntimeError: MULKI_CACHE_DIR is not set, and there is no home directory.
    """
    cache = os.environ.get("MULKI_CACHE_DIR", "")
    folder = Path(cache) if cache else Path.home() / ".cache" / "mulki"
    return folder / f"kernels-{re.sub(r'[^A-Za-z0-9]+', '-', card)}.json"


def read(path: Path, wanted: dict[str, str]) -> Wins:
    """The wins of a file; none, with a warning that names the file, where it is of no use.

    Args:
        wanted: what it has to be of, see `measured_on`.
    """
    try:
        if not path.is_file():  # no device or pipe either, which might not end
            return {}
        with path.open("rb") as file:
            found = json.loads(file.read(_MOST_BYTES))
        of, found = found["of"], found["wins"]
        for name, here in wanted.items():
            if of[name] != here:
                raise ValueError(f"{name}: got {of[name]!r}, wanted {here!r}")
        return {op: _checked(of_operator) for op, of_operator in found.items()}
    except (OSError, KeyError, TypeError, ValueError, RecursionError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        warnings.warn(f"{path}: not used ({reason}); {REMEDY}", stacklevel=2)
        return {}


def write(path: Path, of: dict[str, str], found: Wins) -> None:
    """Write a file, atomically.

    Raises:
        OSError: it cannot be written.
    """
    from mulki.files import write_atomic

    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps({"of": of, "wins": found}, indent=1) + "\n")


def share(group: Any = None) -> None:
    """Have all ranks of a process group take the wins of its first rank.

    No rank takes any where GPUs or versions differ between ranks: kernels round differently.
    """
    global _shared
    kind = "xpu" if torch.xpu.is_available() else "cuda"
    of_ranks: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(of_ranks, (measured_on(kind), _read(kind)), group=group)
    here, first = of_ranks[0]
    _shared = first if all(of == here for of, _ in of_ranks) else {}


@functools.cache
def _read(device_type: str) -> Wins:
    if device_type not in ("cuda", "xpu"):
        return {}
    of = measured_on(device_type)
    try:
        return read(path_of(of["card"]), of)
    except RuntimeError:  # there is no home directory
        return {}


def _checked(of_operator: Any) -> dict[str, int | str]:
    for dtype, value in of_operator.items():
        if not (isinstance(value, str) or (type(value) is int and value >= 0)):
            raise ValueError(f"{dtype}: got {value!r}, wanted a number of logits or a reason")
    return dict(of_operator)
