"""Statistics without stored logits: tiles, parts of the columns, and columns that take no part."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mulki.kernels import schedule, streamed_rows
from mulki.kernels.common import Model
from mulki.kernels.schedule import Plan
from tests.kernels.triton_cases import described, make
from tests.kernels.triton_checks import NUMBER_FORMATS, rows_and_gradients
from tests.kernels.triton_helpers import TOLERANCE, all_close, backward, call, close, reduced

FLOAT = TOLERANCE[torch.float32]
NAMES = ("ce", "ce_all", "kl", "kl_label", "kl_blend", "kl_weights")


@pytest.fixture(autouse=True)
def streamed(monkeypatch):
    """Every loss is streamed that can be, and its gradients are made of blocks; notes what was."""
    plans, taken, compute = (
        {True: Plan("stream", 17, 32), False: Plan("blocks", 17, 32)},
        [],
        streamed_rows.compute,
    )
    monkeypatch.setattr(schedule, "plans", lambda problem: (plans[problem.streamed],))
    noted = lambda rows: (taken.append(rows), compute(rows))[1]  # noqa: E731
    monkeypatch.setattr(streamed_rows, "compute", noted)
    yield taken
    schedule.stream_parts.cache_clear()


@pytest.fixture
def programs(monkeypatch):
    def fill(number):
        monkeypatch.setattr(schedule, "PROGRAMS", number)
        schedule.stream_parts.cache_clear()

    return fill


def made(name, dtype=torch.float32, **sizes):
    return described(make(name, dtype, **{"d": 24, "step": 8, **sizes}))


@pytest.mark.parametrize("number", [2, 8, 132])
@pytest.mark.parametrize("name", NAMES)
def test_rows_and_gradients_of_several_tiles(name, number, programs, streamed):
    """One part of all columns, several, and one for each tile; programs have several blocks."""
    programs(number)
    tile = schedule.tiles("stream", "interpreter", torch.float32)[0]
    parts = schedule.stream_parts(70, 150, tile, models=3)[0]
    assert parts == {2: 1, 8: 3, 132: 5}[number]
    case = made(name, n=70, p=150, d=40)
    rows, of_rows = case.expected(case.upstream())
    close(call(case.op, *case.args)[0], rows, FLOAT)
    all_close(backward(case, case.upstream()), of_rows, FLOAT)
    assert len(streamed) >= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_totals_in_half_precision(name, dtype, streamed):
    case = made(name, dtype)
    total, want = case.expected(mean=True)
    found, gradients, details = reduced(case)
    close(found, total, FLOAT)
    all_close(gradients, want, 2 * TOLERANCE[dtype])
    if details:
        all_close(details, call(case.op, *case.args)[1 : 1 + len(details)], FLOAT)
    assert streamed


def test_the_check_that_a_gpu_is_given(streamed):
    rows_and_gradients("kl_label", NUMBER_FORMATS["fp16"], (19, 35, 24), "cpu", descriptors=True)
    assert streamed


@pytest.mark.parametrize("shape", [(1, 1, 8), (16, 32, 8), (3, 33, 40)])
@pytest.mark.parametrize("name", ["ce", "kl"])
def test_one_tile_or_little_more(name, shape, streamed):
    case = made(name, **dict(zip("npd", shape, strict=True)))
    rows, _ = case.expected(case.upstream())
    torch.testing.assert_close(call(case.op, *case.args)[0].double(), rows, rtol=1e-5, atol=2e-6)
    assert streamed


@pytest.mark.parametrize("name", ["ce_all", "kl_label"])
def test_excluded_classes_may_hold_anything(name, programs):
    """Also where a tile has no other, and in every part of the columns."""
    case = make(name, p=100, d=24, step=8)
    of_mask = 4 if name == "ce_all" else 8
    mask = torch.zeros(100, dtype=torch.bool)
    mask[32:64:3], target = True, torch.full((19,), 35)
    args = list(case.args)
    args[of_mask], args[of_mask - 1] = mask, target
    case = described(replace(case, args=tuple(args)))
    rows, _ = case.expected(case.upstream())
    prototypes = [case.args[1], *(case.args[4] if name == "kl_label" else [])]
    for value, w in zip((torch.nan, torch.inf, -torch.inf), prototypes, strict=False):
        w[~mask] = value
    for number in (1, 132):
        programs(number)
        close(call(case.op, *case.args)[0], rows, FLOAT)


@pytest.mark.parametrize("scale", [0.0, 1e-30, -9.0, 300.0, 3e4])
def test_scales(scale):
    """Of zero, where all classes are alike; of logits whose exponentials would overflow."""
    case = made("ce_all", torch.float16, p=70, scale=scale)
    rows, of_rows = case.expected(case.upstream())
    close(call(case.op, *case.args)[0], rows, 5 * FLOAT)
    found = backward(case, case.upstream())
    all_close(found[2:], of_rows[2:], 1e-4)
    if 1 < abs(scale) < 1e4:
        all_close(found[:2], of_rows[:2], 3 * TOLERANCE[torch.float16])


def test_a_student_that_is_its_teacher_has_exactly_zero(streamed):
    x, w, scale, *_ = made("kl", n=40, p=90).args
    teacher = [x, x], [w, w], scale.expand(2), None, None, None, 3.0, 1.0, 0.0, 0.0, True
    loss, kl, _, entropy = call("teacher_kl", x, w, scale, *teacher)
    assert streamed and not loss.any() and not kl.any() and entropy.all()


def test_a_loss_is_not_negative_where_the_target_is_sure():
    """The target's logit is summed in another order than those of tiles."""
    x = torch.nn.functional.normalize(torch.randn(64, 208, generator=torch.Generator()), dim=1)
    x = described(x.half())
    loss = call("prototype_cross_entropy", x, x, torch.tensor(1e3), torch.arange(64), None, 0.0, -1)
    assert loss[0].max() < 1e-3 and loss[0].min() >= 0


@pytest.mark.parametrize("name", ["ce", "kl"])
def test_a_nan_reaches_the_loss_of_its_row_alone(name):
    case = made(name)
    case.args[0][3] = torch.nan
    found = call(case.op, *case.args)[0].isnan()
    assert found[3] and found.sum() == 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["ce", "kl", "kl_weights"])
def test_a_class_that_is_no_number_reaches_every_loss(name, value):
    """Also where it is the only one of its tile that takes part, and where it is the target."""
    case = made(name, p=33 if name != "kl_weights" else 35)
    args = list(case.args)
    if name == "kl_weights":
        args[8] = torch.arange(35) < 33
    if name == "ce":
        args[3] = torch.full((19,), 32)
    args[1][32] = value
    args[1][32, 0] = torch.nan
    assert call(case.op, *args)[0].isnan().all()


def test_operands_that_no_descriptor_can_have_are_taken_in_blocks(streamed):
    for width in (24, 21):
        case = make("ce", d=width)
        rows, _ = case.expected(case.upstream())
        close(call(case.op, *case.args)[0], rows, FLOAT)
        assert len(streamed) == 1
    x = torch.zeros(4, 24)
    takes = streamed_rows.takes
    assert takes([Model(x, x)]) and takes([Model(x[:, 4:12], x)])
    assert not takes([Model(x[:, 1:9], x)]) and not takes([Model(x[:, :9], x)])
    assert not takes([Model(x[:1].expand(4, 24), x)])
    assert takes([Model(x, x)] * 4) and not takes([Model(x, x)] * 5)
