"""What was shown of the Triton kernels on this machine's GPU: where they are right, and faster.

`mulki prove` makes a proof. From then on the operators take the Triton kernels exactly there. A
proof holds for one kind of GPU, its driver, the versions of torch and Triton, and the kernels'
source; where one of them changes, a new proof is needed. Each proof is a file of the folder
`proofs` in MULKI_CACHE_DIR (default ~/.cache/mulki).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: Classes of calls, and the most logits, N times P, of each.
SIZES = {"small": 1 << 17, "medium": 1 << 22, "large": math.inf}
REMEDY = "`mulki prove` takes some minutes on a GPU"
#: How the reason begins where plain PyTorch is preferred, and nothing is amiss.
SLOWER = "is slower than plain PyTorch"
#: The same where a result was wrong.
WRONG = "was wrong on this GPU"
_DRIVER = Path("/proc/driver/nvidia/version")
_VARIABLES = ("MULKI_INPUT_PRECISION", "MULKI_AUTOTUNE")


@dataclass(frozen=True)
class Verdict:
    """What was found for one operator, dtype and size.

    Args:
        operator: its name.
        dtype: such as "bfloat16".
        size: one of SIZES.
        problems: what is wrong, in words; empty where every value and gradient is right.
        speedup: over plain PyTorch, forward and backward; None where it was not timed.
        forward_speedup: the same of a call without gradients, which may be another kernel.
    """

    operator: str
    dtype: str
    size: str
    problems: tuple[str, ...] = ()
    speedup: float | None = None
    forward_speedup: float | None = None

    @property
    def place(self) -> str:
        return f"{self.operator} {self.dtype} {self.size}"

    def why_not(self, gradients: bool | None = None) -> str | None:
        """Why the kernels are not taken there, in one sentence; None where they are.

        Args:
            gradients: whether the call makes them; None asks for both kinds of calls.
        """
        where = f"in {self.dtype} at {self.size} sizes"
        if self.problems:
            return f"{WRONG} {where} ({self.problems[0]}); please report it"
        for with_gradients, speedup in ((True, self.speedup), (False, self.forward_speedup)):
            if gradients in (with_gradients, None):
                of = where if with_gradients else f"{where} without gradients"
                if speedup is None:
                    return f"could not be timed on this GPU {of}"
                if not speedup >= 1:
                    return f"{SLOWER} on this GPU {of}, {speedup:.2f} times its speed"
        return None


def size_of(n: int, p: int) -> str:
    """The size of a call with N rows and P columns of logits."""
    return next(size for size, most in SIZES.items() if n * p <= most)


def why_not(
    op: str,
    device_type: str,
    dtype: torch.dtype,
    size: str | None = None,
    gradients: bool | None = None,
) -> str | None:
    """Why the Triton kernel of `op` is not taken, in one sentence; None where it is.

    Args:
        size: one of SIZES; None asks for all of them.
        gradients: whether the call makes them; None asks for both kinds of calls.
    """
    name = str(dtype).removeprefix("torch.")
    proofs = [stored(subject) for subject in subjects(device_type)]
    if not proofs or None in proofs:
        return f"has not been tried on this GPU with these versions: {REMEDY}"
    for found in filter(None, proofs):
        for one in SIZES if size is None else (size,):
            verdict = found.get(f"{op} {name} {one}")
            if verdict is None:
                return f"was not tried here in {name} at {one} sizes: {REMEDY}"
            if (reason := verdict.why_not(gradients)) is not None:
                return reason
    return None


def subjects(device_type: str) -> list[dict[str, str]]:
    """What a proof is of, for each kind of GPU that this process sees."""
    count = {"cuda": torch.cuda, "xpu": torch.xpu}
    places = range(count[device_type].device_count()) if device_type in count else [0]
    names = {_gpu_name(torch.device(device_type, i)) for i in places}
    return [_subject(name) for name in sorted(names)]


def subject_of(device: torch.device) -> dict[str, str]:
    """What a proof that was made on this device is of."""
    return _subject(_gpu_name(device))


def _gpu_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "xpu":
        return torch.xpu.get_device_name(device)
    return f"Triton's interpreter on {device.type}"


def numbers() -> tuple[str | None, ...]:
    """Settings of this process that a proof depends on: float32 products and autotuning."""
    return (torch.backends.cuda.matmul.fp32_precision, *map(os.environ.get, _VARIABLES))


def _subject(gpu: str) -> dict[str, str]:
    # How float32 is multiplied is another kernel, and another rival.
    settings = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    common = importlib.import_module("mulki.kernels.common")
    numbers = common.number_family(torch.float32)
    return {"gpu": gpu, "float32 numbers": numbers, **settings, **_versions()}


@functools.cache
def _versions() -> dict[str, str]:
    # The operators decide what the kernels are handed.
    folders = importlib.import_module("mulki.kernels").__path__[0], Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in Path(folder).glob("*.py")):
        digest.update(path.read_bytes())
    try:
        driver = _DRIVER.read_text(encoding="utf-8").splitlines()[0]
    except OSError:
        driver = "unknown"
    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = "unknown"
    return {
        "driver": driver,
        "torch": torch.__version__,
        "triton": triton,
        "kernels": digest.hexdigest()[:12],
    }


def stored(subject: Mapping[str, str]) -> dict[str, Verdict] | None:
    """The verdicts of a proof by place; None where there is no proof, or it cannot be read."""
    # RuntimeError: there is no home directory.
    try:
        found = json.loads(proof_file(subject).read_text(encoding="utf-8"))
        if found["subject"] != subject:
            return None
        verdicts = [_verdict(item) for item in found["verdicts"]]
    except (OSError, RuntimeError, KeyError, TypeError, ValueError):
        return None
    return {verdict.place: verdict for verdict in verdicts}


def store(subject: Mapping[str, str], verdicts: Iterable[Verdict]) -> Path:
    """Keep verdicts, beside the earlier ones of the same subject on other places.

    Raises:
        OSError: the file cannot be written.
    """
    from mulki.files import write_atomic

    path = proof_file(subject)
    path.parent.mkdir(parents=True, exist_ok=True)
    all_of_it = (stored(subject) or {}) | {verdict.place: verdict for verdict in verdicts}
    found = {"subject": dict(subject), "verdicts": [asdict(v) for v in all_of_it.values()]}
    write_atomic(path, json.dumps(found, indent=1))
    return path


def proof_file(subject: Mapping[str, str]) -> Path:
    """Where the proof of a subject is kept."""
    digest = hashlib.sha256(json.dumps(dict(subject), sort_keys=True).encode()).hexdigest()
    return folder() / f"{digest[:16]}.json"


def folder() -> Path:
    """Where all proofs are kept.

    Raises:
        RuntimeError: MULKI_CACHE_DIR is not set, and there is no home directory.
    """
    cache = os.environ.get("MULKI_CACHE_DIR", "")
    return (Path(cache) if cache else Path.home() / ".cache" / "mulki") / "proofs"


def _verdict(item: Any) -> Verdict:
    speedups = item["speedup"], item["forward_speedup"]
    return Verdict(
        str(item["operator"]),
        str(item["dtype"]),
        str(item["size"]),
        tuple(map(str, item["problems"])),
        *(None if speedup is None else float(speedup) for speedup in speedups),
    )
