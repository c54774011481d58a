# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,misc"
"""Statistics of rows (`row_softmax`) in memory, [models, 5, N], and their merge over columns."""

import triton
import triton.language as tl


@triton.jit
def load_state(state_ptr, state_rows, samples, kept, MODELS: tl.constexpr):
    """The five statistics of rows; those of no columns where not `kept`."""
    statistics = ()
    for i in tl.static_range(5):
        of_models = ()
        for m in tl.static_range(MODELS):
            at = state_ptr + (5 * m + i) * state_rows + samples
            of_none = float("-inf") if i == 0 else 0.0
            of_models = of_models + (tl.load(at, mask=kept, other=of_none),)
        statistics = statistics + (of_models,)
    return statistics


@triton.jit
def store_state(state_ptr, state_rows, samples, inside, statistics):
    """Write the first of the five statistics, as many as are given."""
    for i in tl.static_range(len(statistics)):
        for m in tl.static_range(len(statistics[i])):
            at = state_ptr + (5 * m + i) * state_rows + samples
            tl.store(at, statistics[i][m], mask=inside)


@triton.jit
def merge(c2s, old, new):
    """Of two sets of columns the statistics of their union, but for those of the target."""
    old_tops, old_sums, old_moments, old_cross_moments = old[0], old[1], old[2], old[3]
    new_tops, new_sums, new_moments, new_cross_moments = new[0], new[1], new[2], new[3]
    tops, sums, moments, cross_moments = (), (), (), ()
    for m in tl.static_range(len(new_tops)):
        top = tl.maximum(old_tops[m], new_tops[m])
        old_below = tl.where(old_tops[m] == float("-inf"), 0.0, old_tops[m] - top)
        new_below = tl.where(new_tops[m] == float("-inf"), 0.0, new_tops[m] - top)
        old_rescale = tl.exp2(c2s[m] * old_below)
        new_rescale = tl.exp2(c2s[m] * new_below)
        old_moment = old_moments[m] + old_sums[m] * old_below
        new_moment = new_moments[m] + new_sums[m] * new_below
        old_cross_moment, new_cross_moment = old_cross_moments[m], new_cross_moments[m]
        if m == 0:
            student_old_below, student_new_below = old_below, new_below
        else:
            old_cross_moment += old_sums[m] * student_old_below
            new_cross_moment += new_sums[m] * student_new_below
            old_cross_moment *= old_rescale
            new_cross_moment *= new_rescale
        tops = tops + (top,)
        sums = sums + (old_rescale * old_sums[m] + new_rescale * new_sums[m],)
        moments = moments + (old_rescale * old_moment + new_rescale * new_moment,)
        cross_moments = cross_moments + (old_cross_moment + new_cross_moment,)
    return tops, sums, moments, cross_moments
