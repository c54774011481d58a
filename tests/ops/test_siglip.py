"""What siglip alone does: pairs that match well or badly, and blocks of a larger batch."""

from __future__ import annotations

import math

import pytest
import torch

from tests.ops.op_cases import Case, asking, expected, make, relative, run


@pytest.mark.parametrize(("scale", "bias"), [(100.0, -60.0), (60.0, -40.0), (720.0, 0.0)])
def test_siglip_of_pairs_that_match_well_or_badly(scale, bias, backend):
    x = make("siglip", n=200, d=64, dtype=torch.float32).args[0]
    for w in (x, -x):
        case = Case("siglip", (x, w, torch.tensor(scale), torch.tensor(bias), 0))
        value, gradients = expected(case, True)
        got = run(asking(case, "reduced", [True] * 4))
        for one, want in zip(got, (value, *gradients), strict=True):
            assert relative(one, want) < 2e-5


def test_siglip_of_a_match_beyond_any_number(backend):
    """It is as good as certain, so only the other columns have a loss."""
    x, w = torch.zeros(9, 8), torch.zeros(9, 8)
    x[5, 0] = w[5, 0] = 1e10
    total, *_ = run(
        asking(
            Case("siglip", (x, w, torch.tensor(1e30), torch.tensor(-3.0), 0)),
            "reduced",
            [False] * 4,
            mean=False,
        )
    )
    # All logits but this one are the bias.
    wanted = 72 * math.log1p(math.exp(-3.0)) + 8 * math.log1p(math.exp(3.0))
    assert total.item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("p", [3, 32])
def test_an_infinite_feature_gives_the_bias_what_columns_give_it(p, backend):
    """Whether there are columns beyond P that fill a block, or none."""
    x, w = torch.zeros(3, 8), torch.zeros(p, 8)
    w[:, 0] = -1.0
    x[0, 0], w[0, 0] = math.inf, 1.0
    case = Case("siglip", (x, w, torch.tensor(2.0), torch.tensor(-3.0), 0))
    loss, *_, of_bias = run(asking(case, "reduced", [False] * 3 + [True], mean=False))
    _, gradients = expected(case, False)
    assert loss.isfinite() and gradients[3].isfinite()
    torch.testing.assert_close(of_bias.double(), gradients[3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [-(2**40), -150, -149, -1, 0, 1, 64, 299, 300, 2**40])
def test_a_block_of_siglip_at_any_offset(offset, dtype, backend):
    x, w, scale, bias, _ = make("siglip_block", n=150, p=300, d=20, dtype=dtype).args
    case = Case("siglip", (x, w, scale, bias, offset))
    value, gradients = expected(case, False)
    signs = torch.full((150, 300), -1.0)
    for i in range(150):
        if 0 <= i + offset < 300:
            signs[i, i + offset] = 1
    z = scale * (x.double() @ w.double().T) + bias
    torch.testing.assert_close(value, torch.log1p(torch.exp(-signs * z)).sum())
    got = run(asking(case, "reduced", [True] * 4, mean=False))
    tolerance = 2e-5 if dtype == torch.float32 else 5e-3
    for one, want in zip(got, (value, *gradients), strict=True):
        assert relative(one, want) < tolerance


@pytest.mark.parametrize(("n", "p"), [(0, 3), (3, 0), (0, 0)])
def test_a_block_of_siglip_without_rows_or_columns(n, p, backend):
    x, w = torch.ones(n, 4), torch.ones(p, 4)
    case = Case("siglip", (x, w, torch.tensor(2.0), torch.tensor(-1.0), 0))
    assert run(case)[0].tolist() == [0.0] * n
    _, *got = run(asking(case, "backward"))
    assert [g.shape for g in got] == [x.shape, w.shape, (), ()]
    total, *reduced = run(asking(case, "reduced", [True] * 4, mean=False))
    assert total == 0 and all(g.eq(0).all() for g in (*got, *reduced))
