"""The file that says from which size on the Triton kernels win."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest
import torch

from mulki.ops import share_kernels, wins
from tests.ranks import run_ranks

OF = {"card": "a card", "torch": "2", "triton": "3", "mulki": "1"}
WINS: wins.Wins = {"siglip": {"float32": 4096, "bfloat16": "is slower at 8x8x8"}}


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "kernels.json"
    wins.write(path, OF, WINS)
    assert wins.read(path, OF) == WINS


def test_no_file_is_no_win_and_no_warning(tmp_path: Path) -> None:
    assert wins.read(tmp_path / "none.json", OF) == {}


@pytest.mark.parametrize("name", list(OF))
def test_a_file_of_another_card_or_version_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "kernels.json"
    wins.write(path, OF, WINS)
    with pytest.warns(UserWarning, match=f"kernels.json: not used .*{name}.*other"):
        assert wins.read(path, OF | {name: "other"}) == {}


@pytest.mark.parametrize(
    "text",
    [
        *(b"", b"\xff\xfe", b"[1]", b"{}", b"null", b"[" * 60000, b'{"of": {}, "wins": {}}'),
        *(json.dumps({"of": of, "wins": {}}).encode() for of in ([], None, "card", {"card": "x"})),
        *(
            json.dumps({"of": OF, "wins": found}).encode()
            for found in (
                *([], 3, {"siglip": 3}, {"siglip": []}, {"siglip": {"float32": -1}}),
                *({"siglip": {"float32": value}} for value in (True, 1.5, math.nan, None, [])),
            )
        ),
        json.dumps({"of": OF, "wins": {"x" * 100000: {}}}).encode(),
    ],
    ids=lambda text: str(text[-30:]),
)
def test_a_broken_file_is_refused_by_name(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "kernels.json"
    path.write_bytes(text)
    with pytest.warns(UserWarning, match=r"kernels\.json: not used"):
        found = wins.read(path, OF)
    assert found == {}


def least_on_rank(rank: int, world: int, folder: str) -> list[float]:
    """Where versions are the same, then where the last rank has another torch."""
    os.environ["MULKI_CACHE_DIR"] = folder if rank == 0 else f"{folder}/empty"
    if rank == 0:
        of = wins.measured_on("cuda")
        wins.write(wins.path_of(of["card"]), of, WINS)
    found = []
    for version in (torch.__version__, "0"):
        if rank:
            torch.__version__ = version  # type: ignore[assignment]
        share_kernels()
        found.append(wins.least("siglip", "cuda", torch.float32)[0])
    return found


@pytest.mark.skipif(torch.accelerator.is_available(), reason="says which GPU its ranks have")
def test_ranks_take_the_same_kernels(tmp_path: Path) -> None:
    """Those of the first rank's file, which others may lack; none where versions differ."""
    assert run_ranks(2, least_on_rank, str(tmp_path)) == [[4096, math.inf]] * 2
