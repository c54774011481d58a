"""Every kernel as it would be launched, for compilation ahead of time; no GPU is needed.

    for entry in entries("sm_90", "bf16"):
        source = ASTSource(entry.kernel, entry.signature, entry.constants, entry.attributes)
        triton.compile(source, target=TARGETS["sm_90"], options=entry.options)

The operators run on tensors without storage while their launches are recorded, so an entry cannot
differ from a launch. Do not import this under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from . import kernel
from .launch import Launch, recording

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The dtype of operands, and how float32 is multiplied on NVIDIA's and on AMD's hardware.
NUMBERS = {
    "bf16": (torch.bfloat16, "ieee", "ieee"),
    "fp16": (torch.float16, "ieee", "ieee"),
    "fp32": (torch.float32, "tf32x3", "ieee"),
    "tf32": (torch.float32, "tf32", "tf32"),
    "ieee": (torch.float32, "ieee", "ieee"),
}
_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.uint8: "u8",
}
_TILE = (
    *("BLOCK_OWN", "BLOCK_N", "BLOCK_OTHER", "BLOCK_P", "DEPTH", "SLICE"),
    *("SWAP", "PARTS", "STORED"),
)
_ALIGNED = [["tt.divisibility", 16]]

Path = tuple[int, ...]


@dataclass(frozen=True)
class Entry:
    """What `triton.compile` takes."""

    operator: str
    tile: str  # what distinguishes it, in the kernel's own words
    kernel: Any
    signature: dict[str, Any]
    constants: dict[Path, Any]
    attributes: dict[Path, Any]
    options: dict[str, Any]
    architecture: str
    numbers: str

    @property
    def name(self) -> str:
        return " ".join([self.operator, self.kernel.__name__, self.tile]).rstrip()

    @property
    def identity(self) -> str:
        """Tells apart what is compiled differently: a hash of all but the kernel's source."""
        given = self.kernel.__name__, self.signature, self.constants, self.attributes, self.options
        return hashlib.sha256(repr(given).encode()).hexdigest()[:10]


def entries(architecture: str, numbers: str, full: bool = False) -> Iterator[Entry]:
    """All kernels for an architecture of TARGETS and numbers of NUMBERS.

    Every tile of the table with two teachers, which take the most registers; of the other losses
    the default tiles, or (`full`) every tile. D is 512 and, for slices, 1024.
    """
    seen: set[str] = set()
    for name, call in _cases(NUMBERS[numbers][0]).items():
        every_plan = full or name.startswith("teacher_kl") or name == "similarity large True"
        with _precision(architecture, numbers), recording(architecture, every_plan) as launches:
            call()
        for launch in launches:
            entry = _entry(name.split()[0], launch, architecture, numbers)
            if entry.identity not in seen:
                seen.add(entry.identity)
                yield entry


@contextmanager
def _precision(architecture: str, numbers: str) -> Iterator[None]:
    variable = "MULKI_INPUT_PRECISION"
    before = os.environ.get(variable)
    _, on_nvidia, on_amd = NUMBERS[numbers]
    os.environ[variable] = on_nvidia if architecture.startswith("sm_") else on_amd
    try:
        yield
    finally:
        del os.environ[variable]
        if before is not None:
            os.environ[variable] = before


def _cases(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Calls of operators that between them launch every kernel."""

    def new(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def operands(n: int, p: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        return new(n, d, of=dtype), new(p, d, of=dtype), new()

    def labels(n: int, p: int) -> tuple[Tensor, Tensor, float, int]:
        return new(n, of=torch.int64), new(p, of=torch.bool), 0.1, -100

    def teachers(n: int, p: int, k: int, d: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
        return [new(n, d, of=dtype)] * k, [new(p, d, of=dtype)] * k, new(k)

    def kl(n: int, p: int, k: int, d: int) -> Callable[[], object]:
        gate = None, new(n, of=torch.int64), None, 2.0, 1.0, 0.0, 1.0, True
        arguments = *operands(n, p, d), *teachers(n, p, k, d), *gate, True, [True] * 3
        return lambda: kernel("teacher_kl_reduced")(*arguments)

    def call(op: str, *arguments: Any) -> Callable[[], object]:
        return lambda: kernel(op)(*arguments)

    # Large enough for whole tiles (but for chunks), small enough to be split, and for chunks.
    shapes = {"large": (65536, 512), "small": (256, 1000), "chunked": (8192, 4096)}
    three, four = [True] * 3, [True] * 4
    cases: dict[str, Callable[[], object]] = {}
    for size, (n, p) in shapes.items():
        rows = operands(n, p, 512)
        pairs = operands(4000, 4000, 512) if size == "large" else operands(n, n, 512)
        made = {
            f"teacher_kl {size}": kl(n, p, 2, 512),
            f"prototype_cross_entropy {size}": call(
                "prototype_cross_entropy_reduced", *rows, *labels(n, p), True, three
            ),
            f"contrastive {size}": call("contrastive_reduced", *pairs, True, three),
            f"siglip {size}": call("siglip_reduced", *pairs, new(), 0, True, four),
        }
        cases.update(made)
        if size == "chunked":
            continue
        cases[f"teacher_kl {size} wide"] = kl(n, p, 2, 1024)
        for normalize in (False, True):
            cases[f"similarity {size} {normalize}"] = call("similarity", *rows, normalize)
            cases[f"similarity_backward {size} {normalize}"] = call(
                "similarity_backward", new(n, p, of=dtype), *rows, normalize, three
            )
    return cases


def _entry(operator: str, launch: Launch, architecture: str, numbers: str) -> Entry:
    signature: dict[str, Any] = {}
    constants: dict[Path, Any] = {}
    attributes: dict[Path, Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            specialized = not parameter.do_not_specialize
            signature[parameter.name] = _type(value, (i,), constants, attributes, specialized)
    told = [f"{word}={launch.arguments[word]}" for word in _TILE if word in launch.arguments]
    return Entry(
        operator,
        " ".join(told),
        launch.kernel,
        signature,
        constants,
        attributes,
        launch.options,
        architecture,
        numbers,
    )


def _type(
    value: Any,
    path: Path,
    constants: dict[Path, Any],
    attributes: dict[Path, Any],
    specialized: bool = True,
) -> Any:
    """The type as a launch would find it: with 1 and None as constants, and what 16 divides."""
    if isinstance(value, tuple):
        return tuple(_type(v, (*path, i), constants, attributes) for i, v in enumerate(value))
    if value is None or (specialized and isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        attributes[path] = _ALIGNED
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if specialized and value % 16 == 0:
        attributes[path] = _ALIGNED
    return "i32" if -(2**31) <= value < 2**31 else "i64"
