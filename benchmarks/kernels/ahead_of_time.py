"""All variants of the kernels that would be launched, to compile them without a GPU.

    for variant in variants("sm_90", "bf16"):
        source = ASTSource(
            variant.kernel, variant.signature, variant.constants, variant.attributes
        )
        triton.compile(source, target=TARGETS["sm_90"], options=variant.options)

A variant is a kernel with the tile, the constants and the argument types of a launch. Variants come
from recorded launches of the operators on tensors of the device "meta", so they are what a GPU
would be given. Do not import this under TRITON_INTERPRET=1.
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

from mulki.kernels.launch import INT32, Launch, Product, recording
from mulki.kernels.lookup import kernel
from mulki.ops.operators import OPERATORS, Request

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_86": GPUTarget("cuda", 86, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}
# Name: dtype of operands, input_precision of tl.dot on NVIDIA's and on AMD's GPUs.
NUMBER_FORMATS = {
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
# Of arguments, or fields of the argument TILE.
_TILE_NAMES = ("ROWS", "BLOCK_P", "rows", "columns", "depth", "statistics", "whole")
_ALIGNED = [["tt.divisibility", 16]]

Path = tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """What `triton.compile` takes."""

    operator: str
    tile: str  # the values of _TILE_NAMES, as in "rows=16 columns=128"
    kernel: Any
    signature: dict[str, Any]
    constants: dict[Path, Any]
    attributes: dict[Path, Any]
    options: dict[str, Any]
    architecture: str
    number_format: str

    @property
    def name(self) -> str:
        return " ".join([self.operator, self.kernel.__name__, self.tile]).rstrip()

    @property
    def identity(self) -> str:
        """A hash of all that decides the compiled code, except for the source code."""
        parts = self.kernel.__name__, self.signature, self.constants, self.attributes, self.options
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


def variants(architecture: str, number_format: str) -> Iterator[Variant]:
    """All variants for a key of TARGETS and a key of NUMBER_FORMATS."""
    seen: set[str] = set()
    for name, call in _calls(NUMBER_FORMATS[number_format][0]).items():
        with precision(architecture, number_format), recording(architecture) as launches:
            call()
        for launch in launches:
            if isinstance(launch, Product):
                continue
            # Of the others, those of bf16 stand for fp16, but for the type of G.
            of_format = launch.kernel.__name__ in ("whole_rows", "scaled")
            if number_format == "fp16" and not of_format:
                continue
            variant = _variant(name.split()[0], launch, architecture, number_format)
            if variant.identity not in seen:
                seen.add(variant.identity)
                yield variant


@contextmanager
def precision(architecture: str, number_format: str) -> Iterator[None]:
    """How float32 is multiplied in this number format: by our kernels, and by the library."""
    variable, matmul = "MULKI_INPUT_PRECISION", torch.backends.cuda.matmul
    before = os.environ.get(variable), matmul.fp32_precision
    _, on_nvidia, on_amd = NUMBER_FORMATS[number_format]
    os.environ[variable] = on_nvidia if architecture.startswith("sm_") else on_amd
    matmul.fp32_precision = "tf32" if number_format == "tf32" else "ieee"
    try:
        yield
    finally:
        del os.environ[variable]
        if before[0] is not None:
            os.environ[variable] = before[0]
        matmul.fp32_precision = before[1]


def asking(
    op: str,
    *arguments: Any,
    grad: Tensor | None = None,
    reduction: str = "mean",
    gradients: bool = True,
) -> Callable[[], object]:
    """A call of a kernel, for the mean of a loss with all gradients if nothing else is asked."""
    x = OPERATORS[op].arguments(*arguments)
    request = Request(grad, reduction, [gradients] * OPERATORS[op].leaves)
    return lambda: kernel(op)(x, request)


def _calls(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Calls of operators, by name, that together launch every kernel."""

    def new(*shape: int, of: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    def model(n: int, p: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
        return new(n, d, of=dtype), new(p, d, of=dtype), new()

    def labels(n: int, p: int) -> tuple[Tensor, Tensor, float, int]:
        return new(n, of=torch.int64), new(p, of=torch.bool), 0.1, -100

    def teachers(n: int, p: int, k: int, d: int) -> tuple[list[Tensor], ...]:
        return [new(n, d, of=dtype)] * k, [new(p, d, of=dtype)] * k, [new()] * k

    def kl(n: int, p: int, k: int, d: int, gradients: bool = True) -> Callable[[], object]:
        gate = None, new(n, of=torch.int64), None, 2.0, 1.0, 0.0, 1.0
        arguments = *model(n, p, d), *teachers(n, p, k, d), *gate
        return asking("teacher_kl", *arguments, gradients=gradients)

    cases: dict[str, Callable[[], object]] = {}
    # Whole rows, few and many, and the largest tiles; P that a tile holds, of one warp and of many;
    # that it does not hold; and in blocks of columns.
    for size, (n, p) in {
        "whole": (64, 100),
        "wider": (4096, 250),
        "more": (4096, 128),
        "most": (8192, 128),
        "many": (16384, 60),
        "fewer": (16384, 30),
        "small": (256, 1000),
        "chunks": (4096, 4096),
        "tiles": (1024, 20000),
    }.items():
        student = model(n, p, 512)
        cases[f"teacher_kl {size}"] = kl(n, p, 2, 512)
        if size in ("whole", "wider", "most", "small", "tiles"):
            arguments = *student, *labels(n, p)
            cases[f"prototype_cross_entropy {size}"] = asking("prototype_cross_entropy", *arguments)
        if size in ("small", "tiles"):
            cases[f"siglip {size}"] = asking("siglip", *student, new())
    cases["teacher_kl forward"] = kl(4096, 8192, 3, 512, gradients=False)
    for size, (n, p) in {"small": (256, 1000), "large": (4096, 4096)}.items():
        student, pairs = model(n, p, 512), model(n, n, 512)
        cases[f"contrastive {size}"] = asking("contrastive", *pairs)
        gate = None, 2.0, 1.0, 0.0, 1.0, True, True
        cases[f"pair_kl {size}"] = asking("pair_kl", *pairs, *teachers(n, n, 1, 512), *gate)
        for normalize in (False, True):
            of_matrix: dict[str, Any] = {"reduction": "none", "gradients": False}
            operands = *student, normalize
            cases[f"similarity {size} {normalize}"] = asking("similarity", *operands, **of_matrix)
            grad = new(n, p, of=dtype)
            cases[f"similarity {size} {normalize} backward"] = asking(
                "similarity", *operands, grad=grad, reduction="none"
            )
    return cases


def _variant(operator: str, launch: Launch, architecture: str, number_format: str) -> Variant:
    signature: dict[str, Any] = {}
    constants: dict[Path, Any] = {}
    attributes: dict[Path, Any] = {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
        else:
            specialized = not parameter.do_not_specialize
            signature[parameter.name] = _type(
                value, (i,), constants, attributes, architecture, specialized
            )
    tile = launch.arguments.get("TILE")
    given = launch.arguments | ({} if tile is None else tile._asdict())
    return Variant(
        operator,
        " ".join(f"{name}={given[name]}" for name in _TILE_NAMES if name in given),
        launch.kernel,
        signature,
        constants,
        attributes,
        launch.options,
        architecture,
        number_format,
    )


def _type(
    value: Any,
    path: Path,
    constants: dict[Path, Any],
    attributes: dict[Path, Any],
    architecture: str,
    specialized: bool = True,
) -> Any:
    """The type that a launch would infer from a value; notes constants and divisibility by 16."""
    if isinstance(value, tuple):
        members = [
            _type(v, (*path, i), constants, attributes, architecture) for i, v in enumerate(value)
        ]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    if value is None or (specialized and isinstance(value, int) and value == 1):
        constants[path] = value
        return "constexpr"
    if isinstance(value, Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = _ALIGNED
        # Below 2 GiB, AMD's compiler loads and stores by a buffer and an offset of 32 bits.
        if architecture.startswith("gfx") and value.untyped_storage().nbytes() <= INT32:
            attributes[path] = [*attributes.get(path, []), ["tt.pointer_range", 32]]
        return f"*{_TYPES[value.dtype]}"
    if isinstance(value, float):
        return "fp32"
    if specialized and value % 16 == 0:
        attributes[path] = _ALIGNED
    return "i32" if -(2**31) <= value < 2**31 else "i64"
