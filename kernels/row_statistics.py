# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Statistics of rows (`row_softmax`): of the lanes of a tile, in memory, and their merge.

A tile has ROWS rows. Each of its lanes keeps statistics of its own columns, and lanes are combined
once, at the end, so that a tile takes no barrier for them.

In memory they are [models, 5, N]: the fields of `Statistics`, then v at the target.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Statistics(NamedTuple):
    """Of rows [ROWS], or of their lanes [ROWS, COLUMNS]: tuples with a value of every model."""

    tops: Any
    sums: Any
    moments: Any
    cross_moments: Any


@triton.jit
def with_model(statistics, top, total, moment, cross_moment):
    """`statistics` with those of one more model."""
    return Statistics(
        statistics.tops + (top,),
        statistics.sums + (total,),
        statistics.moments + (moment,),
        statistics.cross_moments + (cross_moment,),
    )


@triton.jit
def first_lanes(vs, active, SMOOTHED: tl.constexpr):
    """The statistics of lanes with one column each; one that is not active has no top (-inf)."""
    lanes = Statistics((), (), (), ())
    for m in tl.static_range(len(vs)):
        zero = tl.zeros_like(vs[m])
        cross_moment = zero
        if SMOOTHED and m == 0:
            cross_moment = tl.where(active, vs[m], 0.0)
        top, total = tl.where(active, vs[m], float("-inf")), tl.where(active, 1.0, zero)
        lanes = with_model(lanes, top, total, zero, cross_moment)
    return lanes


@triton.jit
def add_lanes(vs, active, c2s, lanes, SMOOTHED: tl.constexpr):
    """Add a column to each lane. One of exp(old - new) and exp(v - new) is 1: it takes one exp."""
    found = Statistics((), (), (), ())
    for m in tl.static_range(len(vs)):
        v, old = vs[m], lanes.tops[m]
        fresh = old == float("-inf")
        grows = active & ((v <= old) == 0)  # NaN grows, too
        e = tl.exp2(c2s[m] * tl.where(fresh, 0.0, -tl.abs(v - old)))
        top = tl.where(grows, v, old)
        rescale = tl.where(grows, e, 1.0)
        e = tl.where(active, tl.where(grows, 1.0, e), 0.0)
        change = tl.where(fresh, 0.0, old - top)
        below = tl.where(active, v - top, 0.0)
        total, cross_moment = lanes.sums[m], lanes.cross_moments[m]
        if m == 0:
            student_change = change
            student_below = below
            if SMOOTHED:
                cross_moment += tl.where(active, v, 0.0)
        else:
            cross_moment = rescale * (cross_moment + total * student_change) + e * student_below
        moment = rescale * (lanes.moments[m] + total * change) + e * below
        found = with_model(found, top, rescale * total + e, moment, cross_moment)
    return found


@triton.jit
def combine_lanes(c2s, lanes, SMOOTHED: tl.constexpr):
    """The statistics of rows from those of their lanes, along the last axis."""
    found = Statistics((), (), (), ())
    for m in tl.static_range(len(lanes.tops)):
        top = tl.max(lanes.tops[m], 1)
        none = lanes.tops[m] == float("-inf")
        below = tl.where(none, 0.0, lanes.tops[m] - top[:, None])
        rescale = tl.where(none, 0.0, tl.exp2(c2s[m] * below))
        total, cross_moment = lanes.sums[m], lanes.cross_moments[m]
        if m == 0:
            student_below = below
            if not SMOOTHED:
                cross_moment = tl.zeros_like(below)
        else:
            cross_moment = rescale * (cross_moment + total * student_below)
        moment = tl.sum(rescale * (lanes.moments[m] + total * below), 1)
        found = with_model(found, top, tl.sum(rescale * total, 1), moment, tl.sum(cross_moment, 1))
    return found


@triton.jit
def merge(c2s, old, new):
    """The statistics of two sets of columns together, from those of each."""
    found = Statistics((), (), (), ())
    for m in tl.static_range(len(new.tops)):
        top = tl.maximum(old.tops[m], new.tops[m])
        old_below = tl.where(old.tops[m] == float("-inf"), 0.0, old.tops[m] - top)
        new_below = tl.where(new.tops[m] == float("-inf"), 0.0, new.tops[m] - top)
        old_rescale = tl.exp2(c2s[m] * old_below)
        new_rescale = tl.exp2(c2s[m] * new_below)
        old_moment = old.moments[m] + old.sums[m] * old_below
        new_moment = new.moments[m] + new.sums[m] * new_below
        old_cross_moment, new_cross_moment = old.cross_moments[m], new.cross_moments[m]
        if m == 0:
            student_old_below, student_new_below = old_below, new_below
        else:
            old_cross_moment += old.sums[m] * student_old_below
            new_cross_moment += new.sums[m] * student_new_below
            old_cross_moment *= old_rescale
            new_cross_moment *= new_rescale
        found = with_model(
            found,
            top,
            old_rescale * old.sums[m] + new_rescale * new.sums[m],
            old_rescale * old_moment + new_rescale * new_moment,
            old_cross_moment + new_cross_moment,
        )
    return found


@triton.jit
def load_state(state_ptr, state_rows, samples, kept, MODELS: tl.constexpr):
    """The statistics of rows, and v at their targets; those of no columns where not `kept`."""
    found, target_values = Statistics((), (), (), ()), ()
    for m in tl.static_range(MODELS):
        at = state_ptr + 5 * m * state_rows + samples
        found = with_model(
            found,
            tl.load(at, mask=kept, other=float("-inf")),
            tl.load(at + state_rows, mask=kept, other=0.0),
            tl.load(at + 2 * state_rows, mask=kept, other=0.0),
            tl.load(at + 3 * state_rows, mask=kept, other=0.0),
        )
        target_values = target_values + (tl.load(at + 4 * state_rows, mask=kept, other=0.0),)
    return found, target_values


@triton.jit
def store_state(state_ptr, state_rows, samples, inside, statistics, target_values):
    """Write statistics of rows, and v at their targets."""
    for m in tl.static_range(len(statistics.tops)):
        at = state_ptr + 5 * m * state_rows + samples
        tl.store(at, statistics.tops[m], mask=inside)
        tl.store(at + state_rows, statistics.sums[m], mask=inside)
        tl.store(at + 2 * state_rows, statistics.moments[m], mask=inside)
        tl.store(at + 3 * state_rows, statistics.cross_moments[m], mask=inside)
    for m in tl.static_range(len(target_values)):
        tl.store(state_ptr + (5 * m + 4) * state_rows + samples, target_values[m], mask=inside)
