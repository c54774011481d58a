"""The text of PTX as instructions: names, operands, labels, and the line that each came from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple


class Address(NamedTuple):
    base: str
    offset: int


Operand = str | Address | tuple[str, ...]  # the last in braces


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Operand, ...]
    guard: str  # a predicate, or "" where all lanes take part
    negated: bool
    text: str
    source: tuple[str, int]  # file and line of the kernel in Python

    def __str__(self) -> str:
        return f"{self.text!r} of {self.source[0]}:{self.source[1]}"


@dataclass(frozen=True)
class Program:
    name: str
    parameters: tuple[str, ...]
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # the instruction behind each

    def meeting(self, branch: int) -> int:
        """The first instruction that is on every way from a branch to the end."""
        return self._meetings[branch]

    @cached_property
    def _meetings(self) -> dict[int, int]:
        following: dict[int, set[int]] = {}  # of a block, by its first instruction
        of_branch, start = {}, 0
        starts = set(self.labels.values())
        for i, one in enumerate(self.instructions):
            branches = one.opcode.startswith("bra")
            if one.opcode == "ret" or branches or i + 1 in starts:
                last = one.opcode == "ret" or (branches and not one.guard)
                following[start] = set() if last else {i + 1}
                if branches:
                    following[start].add(self.labels[str(one.operands[0])])
                    of_branch[i] = start
                start = i + 1
        # The blocks that are on every way from a block to the end, itself included.
        passed = {one: set(following) for one in following}
        changed = True
        while changed:
            changed = False
            for one, then in reversed(following.items()):
                new = {one}.union(set.intersection(*(passed[to] for to in then)) if then else ())
                changed, passed[one] = changed or new != passed[one], new
        return {
            i: max(passed[block] - {block}, key=lambda one: len(passed[one]))
            for i, block in of_branch.items()
        }


_COMMENT = re.compile(r"//.*")
_GUARD = re.compile(r"@(!?)(%p\d+)\s+")
_OPERAND = re.compile(r"\{[^}]*\}|\[[^]]*\]|[^,\s{}\[\]]+")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\]")


def parse(text: str) -> Program:
    """The only kernel of a text."""
    files = dict(re.findall(r'^\s*\.file\s+(\d+)\s+"(.*)"', text, re.MULTILINE))
    rest = text.partition(".visible .entry ")[2]
    body = rest[rest.index("\n{\n") : rest.index("\n}\n")]
    name = rest.split("(")[0]
    parameters = re.findall(rf"\b{name}_param_\d+", rest[: rest.index("\n{\n")])
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    source = ("", 0)
    for line in body.splitlines():
        line = _COMMENT.sub("", line).strip()
        if found := re.match(r"\.loc\s+(\d+)\s+(\d+)", line):
            source = Path(files[found[1]]).name, int(found[2])
        elif found := re.match(r"(\$\w+):", line):
            labels[found[1]] = len(instructions)
        elif line and not line.startswith((".reg", ".pragma", "{", "}")):
            instructions.append(_instruction(line.removesuffix(";").strip(), source))
    return Program(name, tuple(parameters), tuple(instructions), labels)


def _instruction(text: str, source: tuple[str, int]) -> Instruction:
    guard = _GUARD.match(text)
    opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
    opcode, *more = opcode.split("\t")
    operands = map(_operand, _OPERAND.findall(" ".join([*more, rest])))
    negated = guard is not None and bool(guard[1])
    return Instruction(opcode, tuple(operands), guard[2] if guard else "", negated, text, source)


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(re.findall(r"[%\w$-]+", text))
    if text.startswith("["):
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise NotImplementedError(f"PTX: no interpretation of the address {text}")
        return Address(found[1], int(found[2] or 0))
    return text
