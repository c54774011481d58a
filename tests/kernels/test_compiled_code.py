"""The code that Triton compiles for NVIDIA's GPUs, run on a CPU (`ptx/`) and compared with float64.

Every access is within its tensor, memory is full of NaN at first, and a race of two warps or of two
programs is an error, whatever it does to the result.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton, which this installation has not")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 takes the place of the compilers", allow_module_level=True)

import torch

from mulki.kernels import common, schedule
from mulki.kernels.launch import Launch, recording
from mulki.kernels.schedule import Plan, RowTile
from tests.kernels.ptx.launches import interpreted
from tests.kernels.ptx.memory import Fault
from tests.kernels.triton_cases import NAMES, make
from tests.kernels.triton_checks import (
    NUMBER_FORMATS,
    everything,
    rows_and_gradients,
    totals_and_gradients,
)
from tests.kernels.triton_memory import all_memory
from tests.sweeps import swept

pytestmark = pytest.mark.usefixtures("triton_cache")

WHOLE, CHUNKS = Plan("rows", 16, 35), Plan("chunks", 8, 35)
PAIRS = Plan("blocks", 10, 16)
#: Operator, numbers, N x P x D, plan (None takes the one of the model), and tile of stored logits.
FEW = (
    ("ce_all", "bf16", (19, 35, 21), WHOLE, None),
    ("kl_label", "fp16", (40, 100, 64), Plan("rows", 32, 100), None),
    ("kl_blend", "fp32", (19, 35, 24), WHOLE, None),
    ("kl_weights", "fp32", (19, 35, 20), CHUNKS, None),
    ("kl_confidence", "bf16", (5, 300, 20), Plan("blocks", 4, 256), RowTile(1, 64, 2)),
    ("ce_all", "fp16", (3, 1100, 20), Plan("chunks", 3, 1100), None),
    ("pairs_blend", "bf16", (11, 11, 20), Plan("blocks", 6, 8), None),
    ("contrastive", "fp16", (19, 19, 24), Plan("chunks", 19, 19), None),
    ("siglip_block", "bf16", (19, 19, 20), PAIRS, None),
    ("cosines", "bf16", (19, 35, 21), None, None),
)
#: The same and more, by operator: every schedule in half of the ways to multiply.
ALL = {
    name: [
        (name, numbers, shape, plan, tile)
        for place, numbers in enumerate(NUMBER_FORMATS)
        for number, (shape, plan, tile) in enumerate(
            (
                ((19, 35, 20), None, None),
                ((40, 100, 64), Plan("rows", 32, 100), None),
                ((7, 150, 21), Plan("blocks", 4, 64), RowTile(1, 32, 2)),
                ((3, 1100, 24), Plan("chunks", 2, 1100), None),
            )
        )
        if (place + number) % 2 == 0
        if numbers != "fp16" or name != "cosines"  # whose norms are not of the size of fp16
        if plan is None or plan.schedule != "rows" or name.startswith(("ce", "kl"))
    ]
    for name in NAMES
}


@pytest.fixture
def take(monkeypatch):
    by_model, tile_of = schedule.plan, schedule.row_tile

    def these(plan, tile):
        monkeypatch.setattr(schedule, "plan", (lambda problem: plan) if plan else by_model)
        monkeypatch.setattr(schedule, "row_tile", (lambda *of: tile) if tile else tile_of)

    return these


def named(value):
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)


def shown(case):
    print(*map(named, case))  # pytest shows it where the test fails
    return case


def right(name, numbers, shape, architecture="sm_80", backwards=False):
    """Rows, totals and gradients are those of float64."""
    with interpreted(architecture, backwards), all_memory():
        rows_and_gradients(name, NUMBER_FORMATS[numbers], shape, "cpu")
        if name not in ("similarity", "cosines"):
            totals_and_gradients(name, NUMBER_FORMATS[numbers], shape, "cpu")


@pytest.mark.parametrize(
    ("name", "numbers", "shape", "plan", "tile"),
    [pytest.param(*case, marks=pytest.mark.long if case[0] == "kl_label" else ()) for case in FEW],
    ids=named,
)
def test_results_of_compiled_code(name, numbers, shape, plan, tile, take):
    take(plan, tile)
    right(name, numbers, shape)


@pytest.mark.long
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_results_of_other_architectures(architecture, take):
    for number in swept(len(FEW), 2):
        *case, plan, tile = shown(FEW[number - 1])
        take(plan, tile)
        right(*case, architecture, backwards=True)


@pytest.mark.long
@pytest.mark.parametrize("operator", ALL)
def test_results_of_every_operator_schedule_and_format(operator, take):
    """Every second one with the warps in the other order."""
    for number in swept(len(ALL[operator]), 3):
        *case, plan, tile = shown(ALL[operator][number - 1])
        take(plan, tile)
        right(*case, backwards=number % 2 == 1)


@pytest.mark.parametrize(("name", "numbers", "shape", "plan", "tile"), FEW[4:5], ids=named)
def test_the_order_of_warps_changes_no_bit(name, numbers, shape, plan, tile, take):
    take(plan, tile)
    case, found = make(name, NUMBER_FORMATS[numbers].dtype, *shape), []
    for backwards in (False, True):
        with interpreted(backwards=backwards), all_memory():
            found.append([t.clone() for t in everything(case, case.upstream())])
    assert all(map(torch.equal, *found))


def parsed() -> list[tuple[str, ast.AST]]:
    """All that the kernels' source code consists of, and the file."""
    return [
        (path.name, node)
        for path in sorted(Path(common.__file__).parent.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
    ]


def launched() -> set[str]:
    """The kernels: what `jit_kernel` decorates, and functions of Triton that are launched."""
    decorated: dict[str, list[str]] = {"jit_kernel": [], "triton.jit": []}
    given = set()
    for _, node in parsed():
        if isinstance(node, ast.FunctionDef):
            for decorator in map(ast.unparse, node.decorator_list):
                decorated.get(decorator, []).append(node.name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "launch":
            given.add(ast.unparse(node.args[0]))
    return {*decorated["jit_kernel"], *(given & set(decorated["triton.jit"]))}


def test_every_kernel_is_among_them(take):
    found = set()
    for name, numbers, shape, plan, tile in FEW:
        take(plan, tile)
        case = make(name, NUMBER_FORMATS[numbers].dtype, *shape)
        with recording("sm_80") as launches:
            everything(case, case.upstream())
        found |= {one.kernel.__name__ for one in launches if isinstance(one, Launch)}
    assert found == launched() and "scaled" in found


# What is wrong on purpose is found.


def barriers() -> list[tuple[str, int]]:
    """File and line of every barrier of ours."""
    return [
        (file, node.lineno)
        for file, node in parsed()
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.debug_barrier"
    ]


def without_barrier(file: str, line: int):
    """Leaves out what a line has compiled to; counts how often."""
    left_out: list[str] = []

    def change(name: str, text: str) -> str:
        number = re.search(rf'\.file\s+(\d+)\s+".*/{file}"', text)
        if number is None:
            return text
        barrier = re.compile(rf"(\.loc\s+{number[1]} {line} .*\n)\s*bar\.sync\s+0;")
        changed, count = barrier.subn(r"\1", text)
        left_out.extend([name] * count)
        return changed

    return change, left_out


OF_BARRIERS = {
    "pairs.py": [("contrastive", (40, 40, 20), Plan("chunks", 40, 40), RowTile(1, 64, 2))],
    "products.py": [("siglip_block", (7, 150, 21), Plan("blocks", 4, 64), RowTile(1, 32, 2))],
    "siglip.py": [("siglip", (40, 40, 20), Plan("chunks", 40, 40), RowTile(1, 64, 2))],
    "softmax_loss.py": [
        ("ce_all", (3, 100, 20), Plan("chunks", 3, 100), RowTile(1, 128, 2)),  # all columns
        ("ce_all", (3, 300, 20), Plan("chunks", 3, 300), RowTile(1, 64, 2)),
        ("ce_all", (3, 300, 20), Plan("blocks", 3, 128), RowTile(1, 128, 2)),
    ],
}


_WITH_ALL_BARRIERS: set[tuple[object, ...]] = set()  # cases without a race


@pytest.mark.parametrize(("file", "line"), barriers())
def test_a_barrier_that_is_left_out_is_found(file, line, monkeypatch):
    change, left_out = without_barrier(file, line)
    races = 0
    for name, shape, plan, tile in OF_BARRIERS[file]:
        monkeypatch.setattr(schedule, "plan", lambda problem, plan=plan: plan)
        monkeypatch.setattr(schedule, "row_tile", lambda *of, tile=tile: tile)
        case = make(name, torch.bfloat16, *shape)
        before = len(left_out)
        if (whole := (name, shape, plan, tile)) not in _WITH_ALL_BARRIERS:
            with interpreted(), all_memory():
                everything(case, case.upstream())
            _WITH_ALL_BARRIERS.add(whole)
        try:
            with interpreted(change=change), all_memory():
                everything(case, case.upstream())
        except Fault as fault:
            assert "a race: warp" in str(fault) and left_out[before:], fault
            races += 1
    assert races


def changed(old: str, new: str):
    def change(name: str, text: str) -> str:
        return re.sub(old, new, text) if name == "whole_rows" else text

    return change


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (r"bar\.sync\s+0;", "", "a race: warp"),
        (r"cp\.async\.wait_group\s+\d+;", "", "before it was waited for"),
        (r"(ld\.global\.b32 .*) \+ 0 ", r"\1 + 4096 ", "beside its tensor"),
        (r"(ld\.global\.b32 .*) \+ 0 ", r"\1 + 2 ", "no multiple of 4"),
        (r"add\.rn\.f32", "add.rz.f32", r"no interpretation of add\.rz\.f32 in .*standard\.py"),
    ],
)
def test_what_a_kernel_may_not_do_is_found(old, new, message, take):
    take(WHOLE, None)
    case = make("kl_label", torch.bfloat16, 19, 35, 64)
    wrong = NotImplementedError if "interpretation" in message else Fault
    with pytest.raises(wrong, match=message), interpreted(change=changed(old, new)):
        everything(case, case.upstream())
