"""Launches of Triton's kernels on CPU tensors, as the machine code's text of an NVIDIA GPU."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import triton
from torch import Tensor
from torch.utils._pytree import tree_leaves
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from benchmarks.kernels import ahead_of_time
from mulki.kernels import common
from mulki.kernels.launch import Launch
from tests.kernels.ptx.machine import run
from tests.kernels.ptx.memory import Global
from tests.kernels.ptx.program import parse
from tests.kernels.ptx.steps import Code

_compiled: dict[str, tuple[Any, str]] = {}
_codes: dict[str, Code] = {}


@contextmanager
def interpreted(
    architecture: str = "sm_80",
    backwards: bool = False,
    change: Callable[[str, str], str] = lambda name, text: text,
) -> Iterator[None]:
    """What Triton compiles for an architecture is run here.

    Args:
        backwards: the last warp first.
        change: a kernel's name and its text to the text that is run.
    """

    def launched(kernel: Any, *, grid: Any, warmup: bool, **given: Any) -> None:
        options = {name: given.pop(name) for name in OPTIONS}
        launch = Launch(kernel, grid, given, options)
        compiled, text = _of(launch, architecture)
        text = change(kernel.__name__, text)
        if text not in _codes:
            _codes[text] = Code(parse(text))
        (programs,) = grid
        tensors = [t for t in tree_leaves(given) if isinstance(t, Tensor)]
        device = Global(tensors, programs, options["num_warps"])
        parameters = [*map(_bits, _passed(kernel, given, compiled.src)), 0, 0]
        with np.errstate(all="ignore"):
            run(
                *(_codes[text], programs, options["num_warps"], compiled.metadata.shared),
                *(parameters, device, backwards),
            )

    common.assume_architecture(architecture)
    try:
        with mock.patch.object(JITFunction, "run", launched):
            yield
    finally:
        common.assume_architecture(None)


OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


def _of(launch: Launch, architecture: str) -> tuple[Any, str]:
    variant = ahead_of_time._variant("", launch, architecture, "")
    key = f"{architecture} {variant.identity}"
    if key not in _compiled:
        source = ASTSource(variant.kernel, variant.signature, variant.constants, variant.attributes)
        target = ahead_of_time.TARGETS[architecture]
        compiled = triton.compile(source, target=target, options=variant.options)
        _compiled[key] = compiled, compiled.asm["ptx"]
    return _compiled[key]


def _passed(kernel: Any, given: dict[str, Any], source: ASTSource) -> Iterator[Any]:
    """The arguments that are no constants of the compiled code, in their order."""

    def leaves(value: Any, path: tuple[int, ...]) -> Iterator[Any]:
        if path in source.constants:
            return
        if isinstance(value, tuple):
            for i, one in enumerate(value):
                yield from leaves(one, (*path, i))
        else:
            yield value

    for i, parameter in enumerate(kernel.params):
        yield from leaves(given[parameter.name], (i,))


def _bits(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, float):
        return int.from_bytes(struct.pack("<f", value), "little")
    return int(value)
