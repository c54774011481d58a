"""What was shown of the Triton kernels on this machine's GPU: where they are right, and faster.

`mulki prove` makes a proof. From then on the operators take the Triton kernels exactly there. A
proof holds for one kind of GPU, its driver, the versions of torch and Triton, and what the kernels
are made of; where one of them changes, a new proof is needed. Each proof is a file of the folder
`proofs` in MULKI_CACHE_DIR (default ~/.cache/mulki). Ranks of a process group can `share` those of
the first.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mulki.ops.operators import OPERATORS

#: Classes of calls, and the most logits, N times P, of each.
SIZES = {"small": 1 << 17, "medium": 1 << 22, "large": math.inf}
REMEDY = "`mulki prove` tries it"
#: How the reason begins where another backend is preferred, and nothing is amiss.
SLOWER = "is slower than what serves instead"
#: The same where a result was wrong.
WRONG = "was wrong"
#: Versions of drivers that do not come with the system's kernel: NVIDIA's, and AMD's own.
_DRIVERS = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")
_VARIABLES = ("MULKI_INPUT_PRECISION",)
# What `share` has taken in place of the files here: their texts by name.
_shared: dict[str, str] | None = None


@dataclass(frozen=True)
class Verdict:
    """What was found for one operator, kind of numbers and size.

    Args:
        operator: its name.
        numbers: as `numbers_of` has them.
        size: one of SIZES.
        problems: what is wrong, in words; empty where every value and gradient is right.
        failure: why it did not run to its end.
        speedup: over what serves instead, forward and backward; None where it was not timed.
        forward_speedup: the same of a call without gradients, which may be another kernel.
    """

    operator: str
    numbers: str
    size: str
    problems: tuple[str, ...] = ()
    speedup: float | None = None
    forward_speedup: float | None = None
    failure: str | None = None

    @property
    def place(self) -> str:
        return f"{self.operator} {self.numbers} {self.size}"

    def why_not(self, gradients: bool | None = None, gpu: str = "this GPU") -> str | None:
        """Why the kernels are not taken there, in one sentence; None where they are.

        Args:
            gradients: whether the call makes them; None asks for both kinds of calls.
            gpu: in words.
        """
        where = f"on {gpu} in {self.numbers} at {self.size} sizes"
        if self.failure is not None:
            return f"did not run {where} ({self.failure}); `mulki prove --again` tries it again"
        if self.problems:
            return f"{WRONG} {where} ({self.problems[0]}); please report it"
        for with_gradients, speedup in ((True, self.speedup), (False, self.forward_speedup)):
            if gradients in (with_gradients, None):
                of = where if with_gradients else f"{where} without gradients"
                if speedup is None:
                    return f"could not be timed {of}"
                if not speedup >= 1:
                    return f"{SLOWER} {of}, {speedup:.2f} times its speed"
        return None


def size_of(n: int, p: int) -> str:
    """The size of a call with N rows and P columns of logits."""
    return next(size for size, most in SIZES.items() if n * p <= most)


def numbers_of(dtype: torch.dtype) -> str:
    """The name of a dtype; of float32 "tf32" where PyTorch may multiply it so."""
    if dtype == torch.float32 and settings()[0] == "tf32":
        return "tf32"
    return str(dtype).removeprefix("torch.")


def why_not(
    op: str,
    device: str,
    dtype: torch.dtype,
    size: str | None = None,
    gradients: bool | None = None,
) -> str | None:
    """Why the Triton kernel of `op` is not taken, in one sentence; None where it is.

    Args:
        device: one, as "cuda:1", or "cuda" for all that are here.
        size: one of SIZES; None asks for all of them.
        gradients: whether the call makes them; None asks for both kinds of calls.
    """
    of_cards, numbers = subjects(device), numbers_of(dtype)
    if not of_cards:
        return f"has not been tried here: {REMEDY}"
    for subject in of_cards:
        found, gpu = stored(subject), subject["gpu"]
        if found is None:
            return f"has not been tried on {gpu} with these versions: {REMEDY}"
        for one in SIZES if size is None else (size,):
            verdict = found.get(f"{op} {numbers} {one}")
            if verdict is None:
                return f"has not been tried on {gpu} in {numbers} at {one} sizes: {REMEDY}"
            if (reason := verdict.why_not(gradients, gpu)) is not None:
                return reason
    return None


def subjects(device: str) -> list[dict[str, str]]:
    """What a proof is of, for each kind of GPU among `cards`."""
    return [subject_of(gpu) for gpu in sorted(cards(device))]


def cards(device: str) -> dict[str, torch.device]:
    """A device of each kind of GPU, by its name.

    Args:
        device: one, as "cuda:1", or "cuda" for all that are here.
    """
    asked = torch.device(device)
    modules = {"cuda": torch.cuda, "xpu": torch.xpu}
    if asked.type not in modules:
        return {f"Triton's interpreter on {asked.type}": asked}
    module = modules[asked.type]
    places = range(module.device_count()) if asked.index is None else (asked.index,)
    return {module.get_device_name(i): torch.device(asked.type, i) for i in reversed(places)}


def settings() -> tuple[str | None, ...]:
    """Those of this process that a proof depends on: how float32 is multiplied."""
    # An older torch has no such name. It is asked at every call, also where that is no obstacle.
    multiplied = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    return (multiplied, *map(os.environ.get, _VARIABLES))


def subject_of(gpu: str) -> dict[str, str]:
    """What a proof of this kind of GPU is of."""
    variables = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    return {"gpu": gpu, **variables, **_versions()}


@functools.cache
def _versions() -> dict[str, str]:
    lookup = importlib.import_module("mulki.kernels.lookup")
    return {
        "driver": _driver(),
        "torch": torch.__version__,
        # Its distribution has another name for each kind of GPU.
        "triton": importlib.import_module("triton").__version__,
        "kernels": _digest(Path(str(lookup.__file__)).parent),
    }


def _driver() -> str:
    for path in _DRIVERS:
        try:
            return path.read_text(encoding="utf-8").splitlines()[0]
        except OSError:
            continue
    return platform.release()  # of the system's kernel, which has the others


def _digest(folder: Path) -> str:
    """Of the kernels, without their comments and docstrings, and of what they are handed."""
    digest = hashlib.sha256(repr(sorted(one.schema for one in OPERATORS.values())).encode())
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_bytes())
        for node in ast.walk(tree):
            if isinstance(body := getattr(node, "body", None), list):
                node.body = [one for one in body if not _is_text(one)]  # type: ignore[attr-defined]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def share(group: Any = None) -> None:
    """Have all ranks of a process group take the proofs of its first rank; see `share_proofs`."""
    global _shared
    found = [_texts() if dist.get_rank(group) == 0 else None]
    dist.broadcast_object_list(found, group_src=0, group=group)
    _shared = found[0]


def _texts() -> dict[str, str]:
    try:
        return {path.name: path.read_text(encoding="utf-8") for path in folder().glob("*.json")}
    except (OSError, RuntimeError, UnicodeDecodeError):
        return {}


def stored(subject: Mapping[str, str]) -> dict[str, Verdict] | None:
    """The verdicts of a proof by place; None where there is no proof, or it cannot be read."""
    # RuntimeError: there is no home directory.
    try:
        name = _name(subject)
        text = (folder() / name).read_text("utf-8") if _shared is None else _shared[name]
        found = json.loads(text)
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
    return folder() / _name(subject)


def _name(subject: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(subject), sort_keys=True).encode()).hexdigest()
    return f"{digest[:16]}.json"


def folder() -> Path:
    """Where all proofs are kept.

    Raises:
        RuntimeError: MULKI_CACHE_DIR is not set, and there is no home directory.
    """
    cache = os.environ.get("MULKI_CACHE_DIR", "")
    return (Path(cache) if cache else Path.home() / ".cache" / "mulki") / "proofs"


def _verdict(item: Any) -> Verdict:
    def speedup(name: str) -> float | None:
        return None if item[name] is None else float(item[name])

    return Verdict(
        str(item["operator"]),
        str(item["numbers"]),
        str(item["size"]),
        tuple(map(str, item["problems"])),
        speedup("speedup"),
        speedup("forward_speedup"),
        item["failure"],
    )
