"""Calls that are kept and done again, on plain operations of torch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from mulki.ops import prepared


@pytest.fixture(autouse=True)
def nothing_kept():
    prepared.forget()
    yield
    prepared.forget()


def sums(x, others, factor):
    """Allocations, views with and without an offset, writes, several results of one operation."""
    out = x.new_empty(x.shape, dtype=torch.float64)
    torch.add(x[1:], others[0][:-1], out=out[1:])
    out[0].copy_(others[1][0])
    first, *_ = out.mul_(factor).unbind(1)
    return first, torch.empty(0), others[1].mT, out.sum(0)


class Counted:
    def __init__(self, function=sums):
        self.function, self.calls = function, 0

    def __call__(self, *values):
        self.calls += 1
        return self.function(*values)

    def ask(self, *values):
        key, tensors = prepared.key_of(values, "sums")
        kept = prepared.calls.get(key)
        if callable(kept):
            return prepared.again(kept, tensors)
        return prepared.noted(key, self, *values)


def arguments(seed=0, rows=4, factor=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(rows, 3, generator=generator).to(dtype) for _ in range(3)]
    return made[0], made[1:], factor


def same(found, wanted):
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_the_third_call_does_the_same_with_other_values():
    call = Counted()
    for seed in range(5):
        values = arguments(seed)
        same(call.ask(*values), sums(*values))
    assert call.calls == 2


@pytest.mark.parametrize("inference", [False, True])
def test_a_copy_that_torch_calls_a_view_is_a_copy(inference):
    def copied(x, others, factor):
        return x.contiguous() * factor, x.reshape(-1) + 0, others[0].to(torch.float64) + 0

    call = Counted(copied)
    with torch.inference_mode(inference):
        for seed in range(4):
            x, others, factor = arguments(seed)
            values = x[:3].mT, others, factor
            same(call.ask(*values), copied(*values))
    assert call.calls == 2


def test_a_tensor_given_twice_is_two_tensors_of_a_call():
    call = Counted()
    for seed in range(3):
        x, _, factor = arguments(seed)
        same(call.ask(x, [x, x], factor), sums(x, [x, x], factor))
    x, others, factor = arguments()
    same(call.ask(x, others, factor), sums(x, others, factor))
    assert call.calls == 3


def test_calls_whose_tensors_lie_otherwise_in_one_memory_are_apart():
    def summed(both):
        return (both[0].as_strided((2, 4, 3), (distance, 3, 1)).sum(0),)

    for distance in (12, 20):  # of the same alignment
        call = Counted(summed)
        for seed in range(4):
            memory = torch.randn(44, generator=torch.Generator().manual_seed(seed))
            both = [memory[i * distance + 1 :][:12].view(4, 3) for i in range(2)]
            torch.testing.assert_close(call.ask(both)[0], both[0] + both[1])
        assert call.calls == 2


def test_whatever_changes_a_call_is_in_its_key(monkeypatch):
    x, others, factor = arguments()
    aside = torch.randn(13)[1:].view(4, 3)  # at another alignment
    wide = torch.randn(4, 5)[:, :3]
    keys = [
        prepared.key_of(values, "sums")[0]
        for values in (
            (x, others, factor),
            (x, others, 4.0),
            (x, others[:1], factor),
            (x[:3], others, factor),
            (x.double(), others, factor),
            (aside, others, factor),
            (wide, others, factor),
            (torch.empty(4, 3, device="meta"), others, factor),
            (None, others, factor),
        )
    ]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    keys.append(prepared.key_of((x, others, factor), "sums")[0])
    assert len(set(keys)) == len(keys)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert prepared.key_of((x.clone(), others, factor), "sums")[0] == keys[0]


ELSEWHERE = torch.ones(3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, others, factor: (x * x.sum().item(),),  # reads a value
        lambda x, others, factor: (x + ELSEWHERE,),
        lambda x, others, factor: (ELSEWHERE,),
        lambda x, others, factor: [x := x + 1 for _ in range(prepared.MOST_STEPS + 1)][-1:],
    ],
)
def test_what_is_no_function_of_the_tensors_or_long_is_not_kept(function):
    call = Counted(function)
    for seed in range(4):
        values = arguments(seed)
        same(call.ask(*values), function(*values))
    assert call.calls == 4
    assert list(prepared.calls.values()) == [False]


def test_no_tensor_is_kept():
    call = Counted()
    values = arguments()
    for _ in range(3):
        results = call.ask(*values)
    gone = [weakref.ref(t) for t in (values[0], *values[1], *results)]
    del values, results
    gc.collect()
    assert [one() for one in gone] == [None] * len(gone)


def test_a_call_that_fails_leaves_nothing_behind():
    def fails(x, others, factor):
        raise ValueError(x.sum())

    call = Counted(fails)
    for _ in range(3):
        with pytest.raises(ValueError, match="tensor"):
            call.ask(*arguments())
        assert prepared.recorder() is None


def test_nothing_is_kept_where_that_is_forbidden_and_few_calls_elsewhere(monkeypatch):
    call = Counted()
    with prepared.forbidden():
        for _ in range(3):
            call.ask(*arguments())
        assert call.calls == 3 and not prepared.calls
    monkeypatch.setattr(prepared, "MOST_CALLS", 2)
    for rows in (2, 3, 4, 5):
        call.ask(*arguments(rows=rows))
    assert len(prepared.calls) == 2


def test_autocast_is_off_within():
    call = Counted(lambda x, others, factor: (x.mT @ others[0],))
    values = arguments()
    for _ in range(2):
        exact = call.ask(*values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(call.ask(*values), exact)
    assert call.calls == 2
