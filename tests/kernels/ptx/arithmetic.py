"""Instructions that compute from registers alone: the table of their names.

A function takes and returns arrays over the lanes of a warp. Approximate instructions (ex2, div,
sqrt) are exact but for one rounding here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Lanes = np.ndarray[Any, Any]
TYPES = {
    "b8": np.uint8,
    "u8": np.uint8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "pred": np.bool_,
}
SMALLEST = np.float32(2.0**-126)  # below it .ftz gives zero


class Operation(NamedTuple):
    result: str
    inputs: tuple[str, ...]
    function: Callable[..., Lanes]


def flushed(x: Lanes) -> Lanes:
    return np.where(np.abs(x) < SMALLEST, np.copysign(np.float32(0), x), x)


def fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    # The product of two float32 is exact in float64.
    return (a.astype(np.float64) * b + c).astype(np.float32)


def to_bfloat16(x: Lanes) -> Lanes:
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint16)


def to_tf32(x: Lanes) -> Lanes:
    """To the nearest, of two equally near the one that is farther from zero."""
    bits = x.view(np.uint32)
    return np.where(np.isfinite(x), (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000), bits)


def _shifted(shift: Callable[[Lanes, Lanes], Lanes]) -> Callable[[Lanes, Lanes], Lanes]:
    def function(a: Lanes, count: Lanes) -> Lanes:
        width = 8 * a.itemsize
        out = shift(a, np.minimum(count, width - 1).astype(a.dtype))
        gone = a < 0 if shift is np.right_shift and a.dtype.kind == "i" else np.zeros_like(a)
        return np.where(count < width, out, -gone.astype(a.dtype))

    return function


def _bits(a: Lanes, position: Lanes, length: Lanes) -> Lanes:
    """The field of a at a position, with the sign of its type."""
    width = np.uint32(32)
    return (a << (width - position - length).astype(a.dtype)) >> (width - length).astype(a.dtype)


def _permuted(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
    out = np.zeros_like(a)
    for i in range(4):
        place = (selector >> np.uint32(4 * i)) & np.uint32(15)
        if (place > 7).any():
            raise NotImplementedError("PTX: no interpretation of prmt that copies a sign")
        byte = (both >> (np.uint64(8) * place.astype(np.uint64))) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def _of_pairs(function: Callable[..., Lanes]) -> Callable[..., Lanes]:
    def of_pairs(*given: Lanes) -> Lanes:
        return function(*(one.view(np.float32) for one in given)).view(np.uint64)

    return of_pairs


def _table() -> dict[tuple[str, int], Operation]:
    """By name and number of inputs."""
    table: dict[tuple[str, int], Operation] = {}

    def put(name: str, inputs: str, function: Callable[..., Lanes], result: str = "") -> None:
        types = tuple(inputs.split())
        table[name, len(types)] = Operation(result or types[-1], types, function)

    two, three = "f32 f32", "f32 f32 f32"
    for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        put(f"{name}.rn.f32", two, function)
        for kind in ("s32", "s64", "u32", "u64"):
            put(f"{name}{'.lo' if name == 'mul' else ''}.{kind}", f"{kind} {kind}", function)
    put("fma.rn.f32", three, fma)
    put("fma.rn.ftz.f32", three, lambda *of: flushed(fma(*map(flushed, of))))
    # Two numbers in one register.
    for name, function in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
        put(f"{name}.rn.f32x2", "b64 b64", _of_pairs(function))
    put("fma.rn.f32x2", "b64 b64 b64", _of_pairs(fma))
    put("div.full.f32", two, np.divide)
    put("div.approx.f32", two, np.divide)
    put("ex2.approx.f32", "f32", np.exp2)
    put("ex2.approx.ftz.f32", "f32", lambda a: flushed(np.exp2(flushed(a))))
    put("sqrt.approx.ftz.f32", "f32", lambda a: flushed(np.sqrt(flushed(a))))
    # A NaN gives way to a number.
    put("max.f32", two, np.fmax)
    put("max.f32", three, lambda a, b, c: np.fmax(np.fmax(a, b), c))
    put("min.f32", two, np.fmin)
    for kind in ("f32", "s32", "s64"):
        put(f"neg.{kind}", kind, np.negative)
        put(f"abs.{kind}", kind, np.abs)
    for kind in ("s32", "u32", "s64", "u64"):
        put(f"min.{kind}", f"{kind} {kind}", np.minimum)
        put(f"max.{kind}", f"{kind} {kind}", np.maximum)
        put(f"mad.lo.{kind}", f"{kind} {kind} {kind}", lambda a, b, c: a * b + c)
    for kind, wide in (("s32", "s64"), ("u32", "u64")):
        to: Any = TYPES[wide]
        put(f"mul.wide.{kind}", f"{kind} {kind}", lambda a, b, to=to: a.astype(to) * b, wide)
        put(
            f"mad.wide.{kind}", f"{kind} {kind} {wide}", lambda a, b, c, to=to: a.astype(to) * b + c
        )
    for kind in ("b16", "b32", "b64", "pred"):
        put(f"and.{kind}", f"{kind} {kind}", np.bitwise_and)
        put(f"or.{kind}", f"{kind} {kind}", np.bitwise_or)
        put(f"xor.{kind}", f"{kind} {kind}", np.bitwise_xor)
        put(f"not.{kind}", kind, np.invert)
    for kind in ("b16", "b32", "b64"):
        put(f"shl.{kind}", f"{kind} u32", _shifted(np.left_shift), kind)
    for kind in ("s32", "u32", "s64", "u64"):
        put(f"shr.{kind}", f"{kind} u32", _shifted(np.right_shift), kind)
    for kind in ("s32", "u32"):
        put(f"bfe.{kind}", f"{kind} u32 u32", _bits, kind)
    put("prmt.b32", "b32 b32 b32", _permuted)
    for kind in ("b16", "b32", "b64", "f32"):
        choose: Callable[..., Lanes] = lambda a, b, p: np.where(p, a, b)  # noqa: E731
        put(f"selp.{kind}", f"{kind} {kind} pred", choose, kind)
    for kind in ("b16", "u16", "b32", "u32", "f32", "b64", "u64", "pred"):
        put(f"mov.{kind}", kind, np.copy)
    compare = {
        "eq": np.equal,
        "ne": np.not_equal,
        "lt": np.less,
        "le": np.less_equal,
        "gt": np.greater,
        "ge": np.greater_equal,
    }
    for name, function in compare.items():
        for kind in ("b16", "s16", "u16", "b32", "s32", "u32", "b64", "s64", "u64", "f32"):
            put(f"setp.{name}.{kind}", f"{kind} {kind}", function, "pred")
        either: Callable[..., Lanes] = lambda a, b, of=function: (  # noqa: E731
            of(a, b) | np.isnan(a) | np.isnan(b)
        )
        put(f"setp.{name}u.f32", two, either, "pred")
    # That a NaN is not equal to itself is for `neu` alone.
    put("setp.ne.f32", two, lambda a, b: (a != b) & (a == a) & (b == b), "pred")
    put("setp.num.f32", two, lambda a, b: (a == a) & (b == b), "pred")
    put("setp.nan.f32", two, lambda a, b: (a != a) | (b != b), "pred")
    for to_kind in ("u16", "u32", "s32", "u64", "s64"):
        for kind in ("u16", "s16", "u32", "s32", "u64", "s64"):
            number: Any = TYPES[to_kind]
            put(f"cvt.{to_kind}.{kind}", kind, lambda a, to=number: a.astype(to), to_kind)
    for kind in ("s32", "u32", "s64"):
        put(f"cvt.rn.f32.{kind}", kind, lambda a: a.astype(np.float32), "f32")
    put("cvt.f32.f16", "b16", lambda a: a.view(np.float16).astype(np.float32), "f32")
    put("cvt.f32.bf16", "b16", lambda a: a.astype(np.uint32) << np.uint32(16), "b32")
    put("cvt.rn.bf16.f32", "f32", to_bfloat16, "b16")
    put(
        "cvt.rn.bf16x2.f32",
        two,  # the first is the upper half
        lambda a, b: to_bfloat16(b) | (to_bfloat16(a).astype(np.uint32) << np.uint32(16)),
        "b32",
    )
    half: Callable[..., Lanes] = lambda a: a.astype(np.float16).view(np.uint16)  # noqa: E731
    put("cvt.rn.f16.f32", "f32", half, "b16")
    put(
        "cvt.rn.f16x2.f32",
        two,
        lambda a, b: half(b) | (half(a).astype(np.uint32) << np.uint32(16)),
        "b32",
    )
    put("cvt.rna.tf32.f32", "f32", to_tf32, "b32")
    return table


OPERATIONS = _table()
