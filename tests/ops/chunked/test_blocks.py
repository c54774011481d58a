"""How logits are cut into blocks: all of them once, and memory and products that are bounded."""

from __future__ import annotations

import pytest
import torch

from mulki.ops.chunked import blocks, products
from mulki.ops.chunked.blocks import Blocks, cut, diagonal, own
from mulki.ops.chunked.products import Products
from tests.ops.chunked.watch import MIB, PAIRS, TEACHERS, computed, on_meta
from tests.ops.op_cases import make, run


@pytest.mark.parametrize("count", [0, 1, 5, 64, 65])
@pytest.mark.parametrize("most", [0, 1, 7, 64, 1000])
def test_parts_are_all_and_of_one_size(count, most):
    parts = cut(count, most)
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(count))
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) <= max(most, 1) and len(set(sizes[:-1])) <= 1


def test_columns_are_cut_where_too_few_rows_would_be_left(monkeypatch):
    monkeypatch.setenv("MULKI_CHUNK_MB", "2")
    model = Products(torch.empty(1000, 8), torch.empty(2000, 8))
    whole = Blocks.of([model], 2, False)
    assert len(whole.columns) == 1 and whole.rows[0].stop > blocks.LEAST_ROWS // 2
    monkeypatch.setenv("MULKI_CHUNK_MB", "0.5")
    both = Blocks.of([model], 2, False)
    assert len(both.columns) > 1 and both.rows[0].stop > blocks.LEAST_ROWS // 2


@pytest.mark.parametrize("offset", [-3, 0, 2])
def test_own_logits_of_a_block(offset):
    u = torch.arange(11 * 9.0).view(11, 9)
    for rows in (slice(0, 11), slice(0, 4), slice(4, 8), slice(8, 11)):
        for columns in (slice(0, 9), slice(0, 5), slice(5, 9)):
            inside = own(rows, columns, offset)
            wanted = [u[i, i + offset].item() for i in range(inside.start, inside.stop)]
            assert diagonal(u[rows, columns], rows, columns, offset).tolist() == wanted


@pytest.mark.parametrize("given", ["0", "-1", "many", "inf", "nan"])
def test_a_size_that_is_none_is_refused(given, monkeypatch):
    monkeypatch.setenv("MULKI_CHUNK_MB", given)
    with pytest.raises(ValueError, match="^MULKI_CHUNK_MB: got"):
        run(make("ce", dtype=torch.float32))


@pytest.mark.parametrize(
    ("dtype", "halves"),
    [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)],
    ids=["floats", "cast", "halves"],
)
@pytest.mark.parametrize(
    ("name", "n", "p", "d"),
    [
        *((name, 8192, 8192, 64) for name in TEACHERS),
        *((name, 32768, 100, 1024) for name in TEACHERS if name not in (*PAIRS, "siglip")),
    ],
)
def test_memory_is_bounded_whatever_n_and_p(name, n, p, d, dtype, halves, monkeypatch):
    """On a device without memory: logits of 256 MiB a model, of which 64 MiB are worked on."""
    monkeypatch.setattr(products, "multiplies_halves", lambda *_: halves)
    case = on_meta(name, n, p, dtype, d)
    gradients = sum(leaf.numel() * 4 for leaf in case.args[:2])
    of_rows = 60 * n * 4
    assert computed(case).largest < 64 * MIB + gradients + of_rows


@pytest.mark.parametrize("name", TEACHERS)
def test_products_are_the_fewest(name, monkeypatch):
    """K + 3 where rows have all their columns; one more for each model where columns are cut."""
    k = TEACHERS[name]
    assert computed(on_meta(name, 64, 64, torch.float32)).products == k + 3
    copies = 3 if name in PAIRS else 2
    rows = 48 * MIB // (4 * copies * (k + 1)) // 4096
    found = computed(on_meta(name, 4096, 4096, torch.float32)).products
    assert found == (2 * k + 4 if name in PAIRS else k + 3) * -(-4096 // rows)
    if name != "siglip":
        monkeypatch.setattr(blocks, "LEAST_ROWS", 4096)  # rather than fewer rows, fewer columns
        found = computed(on_meta(name, 4096, 4096, torch.float32)).products
        assert found > 0 and found % (2 * k + 4) == 0
