"""What calls and chunks cost the host, by count."""

from __future__ import annotations

import itertools
import os
import re

import pytest

pytest.importorskip("triton", reason="needs Triton, which this installation has not")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("Triton launches nothing where it interprets", allow_module_level=True)

import torch
import triton
import triton.compiler
from triton.runtime import driver

from benchmarks.kernels import ahead_of_time, host
from benchmarks.kernels.counts import OPERATORS, calls_of
from mulki.kernels import chunks, common, launch, schedule
from tests.ops.op_cases import Operations

BLOCKS = schedule.Plan("blocks", 64, 128)

LOSSES = [operator for operator in OPERATORS if operator != "similarity"]


def test_a_chunk_takes_few_calls():
    assert 5 < host.of_a_chunk(host.python_calls) <= 12


@pytest.mark.parametrize("operator", LOSSES)
def test_memory_is_taken_once_for_all_chunks(operator):
    """Nothing but our kernels and the library's products, which are left out, is for a chunk."""
    noted = []
    for n in (256, 640):
        (call,) = calls_of(operator, n, n, 64, "bf16")
        with host.idle(BLOCKS), Operations() as operations:
            call()
        noted.append(operations.names)
    # The sum of parts of rows of dX is rounded once all are there.
    few, many = ([name for name in names if name != "copy_"] for names in noted)
    assert few == many and len(few) > 3
    assert noted[1].count("copy_") <= 640 // BLOCKS.rows + 1


def launched(operator, n, plan, monkeypatch):
    """What Triton is asked to launch for blocks, and all that is: kernels, and their arguments."""
    asked, ran = [], []
    ask = launch.launch
    monkeypatch.setattr(
        launch, "launch", lambda *of, **given: (asked.append(of[0]), ask(*of, **given))[1]
    )
    # Of nine arguments before the kernel's own, three are the grid.
    run = property(lambda kernel: lambda *given: ran.append((kernel, given[:3], seen(given[9:]))))
    monkeypatch.setattr(host.IdleKernel, "run", run)
    (call,) = calls_of(operator, n, n, 64, "bf16")
    with host.idle(plan):
        call()
    return asked, ran


def seen(given):
    if isinstance(given, (tuple, list)):
        return tuple(map(seen, given))
    return (given.shape, given.stride(), given.dtype) if isinstance(given, torch.Tensor) else given


@pytest.mark.parametrize(("n", "rows", "columns"), [(320, 40, 136), (7, 1, 3)])
@pytest.mark.parametrize("operator", LOSSES)
def test_a_kept_kernel_is_that_which_triton_finds(operator, n, rows, columns, monkeypatch):
    """It is handed what Triton would hand it, in each block. Triton is asked once for each size."""
    plan = schedule.Plan("blocks", rows, columns)
    with monkeypatch.context() as patch:
        asked, ran = launched(operator, n, plan, patch)
    with monkeypatch.context() as patch:
        patch.setattr(launch, "INT32", -1)  # nothing fits, so nothing is kept
        always_asked, wanted = launched(operator, n, plan, patch)
    assert ran == wanted
    assert len(asked) <= 10 < len(always_asked)


@pytest.mark.parametrize(
    ("operator", "n", "p"),
    [*((operator, 200, 200) for operator in OPERATORS), ("similarity", 3_000_000, 100)],
)
@pytest.mark.parametrize("architecture", ["sm_90", "gfx942"])
def test_what_triton_would_compile_is_what_is_compiled_ahead_of_time(
    architecture, operator, n, p, monkeypatch
):
    """The same types, constants and attributes, also of tensors beyond 2 GiB."""
    found = []

    class Noted(host.IdleKernel):
        def __init__(self, src):
            super().__init__(src)
            found.append((src.name, src.signature, src.constants, nonempty(src.attrs)))

    monkeypatch.setattr(host, "IdleKernel", Noted)
    monkeypatch.setattr(host, "ARCHITECTURE", architecture)
    monkeypatch.setattr(host, "TARGET", ahead_of_time.TARGETS[architecture])
    device = -2 - next(_devices)  # for which no kernel is kept
    monkeypatch.setattr(host.NoDevice, "get_current_device", lambda _: device)
    calls = calls_of(operator, n, p, 512, "bf16")
    with ahead_of_time.precision(architecture, "bf16"):
        with host.idle():
            for call in calls:
                call()
        with launch.recording(architecture) as launches:
            for call in calls:
                call()
    wanted = [
        (one.kernel.__name__, one.signature, one.constants, one.attributes)
        for each in launches
        if isinstance(each, launch.Launch)
        for one in [ahead_of_time._variant(operator, each, architecture, "bf16")]
    ]
    assert {repr(one) for one in found} == {repr(one) for one in wanted} and found


_devices = itertools.count()


def nonempty(attributes):
    return {path: value for path, value in attributes.items() if value}


def test_a_count_of_64_bits_is_for_triton(monkeypatch):
    asked = []
    monkeypatch.setattr(launch, "launch", lambda *of, **given: asked.append(given))
    repeated = launch.Repeated(None, (1,), 1, 1)
    monkeypatch.setattr(repeated, "_run", lambda *given: pytest.fail("launched another type"))
    repeated(first_row=2**31, first_column=0)
    assert asked == [{"first_row": 2**31, "first_column": 0}]


def test_a_view_more_in_a_chunk_would_be_seen(monkeypatch):
    """Each chunk multiplies by the same views of prototypes and logits."""
    views = []
    right = chunks.multiply
    monkeypatch.setattr(
        chunks, "multiply", lambda *given, **add: (views.append(given), right(*given, **add))
    )
    with host.idle(schedule.Plan("chunks", host.ROWS, host.P)):
        host.call_of(3)()
    logits = [given for given in views if given[2].shape == (host.ROWS, host.P)]
    assert len(logits) == 9
    assert len({id(given[1]) for given in logits}) == len({id(given[2]) for given in logits}) == 3


def test_nothing_is_left_of_the_idle_driver(capsys):
    before = (
        torch.mm,
        torch.bmm,
        torch.addmm,
        schedule.plan,
        driver._active,
        triton.compiler.compile,
    )
    assert host.main() == 0
    chunk, *steps = capsys.readouterr().out.splitlines()
    assert re.match(r"a chunk of dual_teacher_kl: \d+ us of Python, \d+ calls ", chunk)
    assert len(steps) == len(host.STEPS)
    for (n, p), line in zip(host.STEPS, steps, strict=True):
        assert re.fullmatch(rf"a step at {n} x {p}: \d+ us of Python", line)
    after = torch.mm, torch.bmm, torch.addmm, schedule.plan, driver._active, triton.compiler.compile
    assert after == before
    assert common._assumed is None
