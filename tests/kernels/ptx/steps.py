"""Every instruction as a step: a function of a warp that returns where to go on, or None.

A register is an array over the 32 lanes of a warp. An instruction that is not known is an error
that names it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.kernels.ptx import lanes
from tests.kernels.ptx.arithmetic import OPERATIONS, TYPES, Lanes, Operation
from tests.kernels.ptx.memory import Global, Shared
from tests.kernels.ptx.program import Address, Instruction, Operand, Program

Step = Callable[["Warp"], int | None]
BARRIER, END, PARTED = -1, -2, -3
WIDTHS = {"%rs": 2, "%rd": 8, "%r": 4, "%p": 1}
SPECIAL = ("%tid.x", "%ctaid.x", "%nctaid.x")
EVERY_LANE = np.ones(32, np.bool_)
UNSET = 0x7FC0BEAF7FC0BEAF  # the bits of a register that nothing was written to: NaN


class Warp:
    def __init__(self, number: int, registers: list[Any], shared: Shared, device: Global) -> None:
        self.number, self.registers = number, registers
        self.shared, self.device = shared, device
        self.lanes = EVERY_LANE  # those that take part in the instruction
        self.next = 0
        self.copies: list[list[tuple[Lanes, list[Lanes]]]] = [[]]  # groups; the last is open


class Part(NamedTuple):
    """A step without its guard, and what is to know where not all lanes take part."""

    step: Step
    guard: tuple[int, bool] | None  # a predicate, and whether it is negated
    written: Sequence[int]  # places of registers
    branch: int | None  # where it goes on


class Code:
    """The steps of a program, and the places of its registers and constants."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.places: dict[tuple[str, int], int] = {}
        self.constants: list[Any] = []
        for name in SPECIAL:
            self._place(name, 4, None)
        for name in program.parameters:
            self._place(name, 0, None)
        self.parts = [self._part(one) for one in program.instructions]
        self.steps = [_guarded(part) if part.guard else part.step for part in self.parts]

    def _place(self, name: str, width: int, value: Any) -> int:
        key = name, width
        if key not in self.places:
            self.places[key] = len(self.constants)
            self.constants.append(value)
        return self.places[key]

    def register(self, name: Operand) -> tuple[int, int]:
        """The place of a register, and its bytes."""
        assert isinstance(name, str), name
        width = next(size for prefix, size in WIDTHS.items() if name.startswith(prefix))
        unsigned: Any = np.bool_ if width == 1 else f"u{width}"
        return self._place(name, width, np.full(32, UNSET >> (64 - 8 * width), unsigned)), width

    def operand(self, text: Operand, kind: str) -> int:
        """The place of a register or a constant that is read as this type."""
        assert isinstance(text, str), text
        if text in SPECIAL:
            return self._place(text, 4, None)
        if text.startswith("%"):
            return self.register(text)[0]
        number: Any = TYPES[kind]
        width = np.dtype(number).itemsize
        if text == "global_smem":
            value = 0
        elif text.startswith("0f"):
            value = int(text.replace("0f", "0x"), 0)
        else:
            value = int(text.removesuffix("U"), 0)
        unsigned: Any = np.bool_ if kind == "pred" else f"u{width}"
        bits = bool(value) if kind == "pred" else value % (1 << 8 * width)
        return self._place(f"{kind} {text}", width, np.full(32, bits, unsigned))

    def _part(self, one: Instruction) -> Part:
        guard = (self.register(one.guard)[0], one.negated) if one.guard else None
        step = self._step(one)
        written = [self.register(name)[0] for name in _written(one)]
        branch = self.program.labels[str(one.operands[0])] if one.opcode[:3] == "bra" else None
        return Part(step, guard, written, branch)

    def _step(self, one: Instruction) -> Step:
        operation = OPERATIONS.get((one.opcode, len(one.operands) - 1))
        if operation is not None and not any(isinstance(x, tuple) for x in one.operands):
            return self._arithmetic(one, operation)
        name, *kinds = one.opcode.split(".")
        build = getattr(self, f"_{name}", None)
        step = build(one, kinds) if build is not None else None
        if step is None:
            raise NotImplementedError(f"PTX: no interpretation of {one.opcode} in {one}")
        return step  # type: ignore[no-any-return]

    def _arithmetic(self, one: Instruction, operation: Operation) -> Step:
        result, inputs, function = operation
        to, width = self.register(one.operands[0])
        stored: Any = np.bool_ if width == 1 else f"u{width}"
        types: list[Any] = [TYPES[kind] for kind in inputs]
        given = [self.operand(x, k) for x, k in zip(one.operands[1:], inputs, strict=True)]
        assert np.dtype(TYPES[result]).itemsize == width, one
        if len(given) == 1:
            ((a,), (of_a,)) = given, types

            def unary(warp: Warp) -> None:
                r = warp.registers
                r[to] = function(r[a].view(of_a)).view(stored)

            return unary
        if len(given) == 2:
            ((a, b), (of_a, of_b)) = given, types

            def binary(warp: Warp) -> None:
                r = warp.registers
                r[to] = function(r[a].view(of_a), r[b].view(of_b)).view(stored)

            return binary
        ((a, b, c), (of_a, of_b, of_c)) = given, types

        def ternary(warp: Warp) -> None:
            r = warp.registers
            r[to] = function(r[a].view(of_a), r[b].view(of_b), r[c].view(of_c)).view(stored)

        return ternary

    def _mov(self, one: Instruction, kinds: list[str]) -> Step | None:
        """Two registers from one of twice their bytes, or the reverse."""
        if kinds not in (["b32"], ["b64"]):
            return None
        to, given = one.operands
        whole, half = int(kinds[0][1:]), int(kinds[0][1:]) // 2
        of_whole: Any = f"u{whole // 8}"
        of_half: Any = f"u{half // 8}"
        if isinstance(to, tuple):
            low, high = (None if x == "_" else self.register(x)[0] for x in to)
            place = self.operand(given, f"b{whole}")

            def split(warp: Warp) -> None:
                value = warp.registers[place].view(of_half)
                for part, at in enumerate((low, high)):
                    if at is not None:
                        warp.registers[at] = value[part::2].copy()

            return split
        assert isinstance(given, tuple)
        first, second = (self.operand(x, f"b{half}") for x in given)
        place = self.register(to)[0]

        def joined(warp: Warp) -> None:
            both = np.stack([warp.registers[first], warp.registers[second]], 1)
            warp.registers[place] = both.reshape(-1).view(of_whole)

        return joined

    # Where to go on.

    def _bra(self, one: Instruction, kinds: list[str]) -> Step:
        target = self.program.labels[str(one.operands[0])]

        def jump(warp: Warp) -> int:
            return target if warp.lanes.all() else PARTED

        return jump

    def _ret(self, one: Instruction, kinds: list[str]) -> Step:
        return lambda warp: END

    def _bar(self, one: Instruction, kinds: list[str]) -> Step | None:
        if kinds == ["warp", "sync"]:
            return lambda warp: None
        return (lambda warp: BARRIER) if one.operands == ("0",) and kinds == ["sync"] else None

    # Memory.

    def _ld(self, one: Instruction, kinds: list[str]) -> Step | None:
        space, (size, count, signed) = kinds[0], _element(kinds[1:])
        to, address = one.operands
        names = to if isinstance(to, tuple) else (to,)
        places = [self.register(name) for name in names]
        assert isinstance(address, Address) and len(places) == count, one
        if space == "param":
            source = self._place(address.base, 0, None)
            ((place, width),) = places
            kept: Any = f"u{width}"

            def load_parameter(warp: Warp) -> None:
                warp.registers[place] = np.full(32, warp.registers[source] % (1 << 8 * width), kept)

            return load_parameter if signed or width == size else None
        where, take = self._address(address, space), _memory(space)
        if take is None:
            return None

        def load(warp: Warp) -> None:
            on = warp.lanes
            found = take(warp).load(warp.number, where(warp)[on], size, count)
            for (place, width), values in zip(places, found, strict=True):
                value = np.zeros(32, f"u{width}")
                value[on] = values
                warp.registers[place] = value

        return load

    def _st(self, one: Instruction, kinds: list[str]) -> Step | None:
        space, (size, count, _) = kinds[0], _element(kinds[1:])
        address, given = one.operands
        names = given if isinstance(given, tuple) else (given,)
        assert isinstance(address, Address) and len(names) == count, one
        places = [self.operand(name, f"b{8 * size}") for name in names]
        where, take = self._address(address, space), _memory(space)
        if take is None:
            return None
        stored: Any = f"u{size}"

        def store(warp: Warp) -> None:
            on = warp.lanes
            values = [warp.registers[place][on].astype(stored) for place in places]
            take(warp).store(warp.number, where(warp)[on], size, values)

        return store

    def _address(self, address: Address, space: str) -> Callable[[Warp], Lanes]:
        place = self.operand(address.base, "u64" if space == "global" else "u32")
        offset = np.int64(address.offset)
        return lambda warp: warp.registers[place].astype(np.int64) + offset

    def _cp(self, one: Instruction, kinds: list[str]) -> Step | None:
        if kinds == ["async", "commit_group"]:
            return lambda warp: warp.copies.append([])
        if kinds == ["async", "wait_group"]:
            left = int(str(one.operands[0])) + 1

            def wait(warp: Warp) -> None:
                while len(warp.copies) > left:
                    for to, values in warp.copies.pop(0):
                        warp.shared.end_copy(warp.number, to, values)

            return wait
        if kinds not in (["async", level, "shared", "global"] for level in ("ca", "cg")):
            return None
        to, source, size, *read = one.operands
        assert isinstance(to, Address) and isinstance(source, Address)
        target, origin = self._address(to, "shared"), self._address(source, "global")
        size = int(str(size), 0)
        amount = self.operand(read[0], "u32") if read else None

        def copy(warp: Warp) -> None:
            on, shared = warp.lanes, warp.shared
            sizes = np.full(32, size) if amount is None else warp.registers[amount]
            if not np.isin(sizes[on], (0, size)).all():
                raise NotImplementedError("PTX: no interpretation of cp.async of a part")
            read = (sizes == size)[on]
            values = [np.zeros(on.sum(), np.uint32) for _ in range(size // 4)]
            if read.any():
                found = warp.device.load(warp.number, origin(warp)[on][read], 4, size // 4)
                for value, part in zip(values, found, strict=True):
                    value[read] = part
            addresses = target(warp)[on]
            shared.begin_copy(warp.number, addresses, size)
            warp.copies[-1].append((addresses, values))

        return copy

    # A whole warp.

    def _ldmatrix(self, one: Instruction, kinds: list[str]) -> Step | None:
        if not _of_matrices(kinds):
            return None
        (to, address), transposed = one.operands, "trans" in kinds
        places = [self.register(name)[0] for name in to]
        assert isinstance(address, Address)
        where = self._address(address, "shared")

        def load(warp: Warp) -> None:
            rows = np.stack(warp.shared.load(warp.number, where(warp)[: 8 * len(places)], 4, 4), 1)
            for i, place in enumerate(places):
                warp.registers[place] = lanes.matrix(rows[8 * i : 8 * i + 8].copy(), transposed)

        return load

    def _stmatrix(self, one: Instruction, kinds: list[str]) -> Step | None:
        if not _of_matrices(kinds):
            return None
        (address, given), transposed = one.operands, "trans" in kinds
        places = [self.operand(name, "b32") for name in given]
        assert isinstance(address, Address)
        where = self._address(address, "shared")

        def store(warp: Warp) -> None:
            rows = [lanes.rows_of(warp.registers[place], transposed) for place in places]
            to = where(warp)[: 8 * len(places)]
            warp.shared.store(warp.number, to, 4, list(np.concatenate(rows).T))

        return store

    def _mma(self, one: Instruction, kinds: list[str]) -> Step | None:
        shape, numbers = kinds[2], kinds[5:]
        if kinds[:2] != ["sync", "aligned"] or kinds[3:5] != ["row", "col"]:
            return None
        half = numbers[1]
        if (shape, numbers) == ("m16n8k8", ["f32", "tf32", "tf32", "f32"]):
            function: Any = lanes.product_16x8x8
        elif shape == "m16n8k16" and numbers in (["f32", of, of, "f32"] for of in ("f16", "bf16")):
            function = lambda a, b, c: lanes.product_16x8x16(a, b, c, half)  # noqa: E731
        else:
            return None
        to, *given = ([self.operand(x, "b32") for x in group] for group in one.operands)

        def multiply(warp: Warp) -> None:
            a, b, c = ([warp.registers[place] for place in group] for group in given)
            for place, value in zip(to, function(a, b, c), strict=True):
                warp.registers[place] = value

        return multiply

    def _redux(self, one: Instruction, kinds: list[str]) -> Step | None:
        if kinds != ["sync", "max", "f32"]:
            return None
        place, source, members = (self.operand(x, "b32") for x in one.operands)

        def largest(warp: Warp) -> None:
            r = warp.registers
            assert (r[members] == 0xFFFFFFFF).all()
            most = np.fmax.reduce(r[source].view(np.float32))
            r[place] = np.full(32, most, np.float32).view(np.uint32)

        return largest

    def _shfl(self, one: Instruction, kinds: list[str]) -> Step | None:
        to, given, other, last, members = one.operands
        if (kinds[0], kinds[2:], last, members) != ("sync", ["b32"], "31", "-1"):
            return None
        place, source = self.register(to)[0], self.operand(given, "b32")
        lane, kind = self.operand(other, "u32"), kinds[1]

        def exchange(warp: Warp) -> None:
            r = warp.registers
            r[place] = lanes.exchanged(kind, r[source], r[lane])

        return exchange


def _guarded(part: Part) -> Step:
    assert part.guard is not None
    (place, negated), step = part.guard, part.step

    def guarded(warp: Warp) -> int | None:
        taking_part = warp.registers[place] ^ negated
        if taking_part.all():
            return step(warp)
        return masked(warp, part, taking_part) if taking_part.any() else None

    return guarded


def masked(warp: Warp, part: Part, taking_part: Lanes) -> int | None:
    """A step of some lanes."""
    before = [warp.registers[at] for at in part.written]
    warp.lanes = taking_part
    found = part.step(warp)
    warp.lanes = EVERY_LANE
    for at, old in zip(part.written, before, strict=True):
        warp.registers[at] = np.where(taking_part, warp.registers[at], old)
    return found


def _written(one: Instruction) -> Sequence[str]:
    """Registers that an instruction writes."""
    to = one.operands[0] if one.operands else ()
    if one.opcode.startswith(("st", "bra", "cp.", "bar.", "ret")):
        return ()
    return [name for name in (to if isinstance(to, tuple) else (str(to),)) if name != "_"]


def _of_matrices(kinds: list[str]) -> bool:
    rest = [kind for kind in kinds if kind != "trans"]
    return rest[:3] == ["sync", "aligned", "m8n8"] and rest[4:] == ["shared", "b16"]


def _element(kinds: list[str]) -> tuple[int, int, bool]:
    """Bytes of an element, elements, and whether it is signed: of v4.b32 or the like."""
    count = int(kinds[0][1:]) if kinds[0] in ("v2", "v4") else 1
    (kind,) = kinds[1:] if count > 1 else kinds
    return np.dtype(TYPES[kind]).itemsize, count, kind.startswith("s")


def _memory(space: str) -> Callable[[Warp], Any] | None:
    if space == "shared":
        return lambda warp: warp.shared
    return (lambda warp: warp.device) if space == "global" else None
