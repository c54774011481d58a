"""What is kept of proofs, and when the Triton kernels are taken."""

from __future__ import annotations

import os
import platform
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from mulki.ops import proofs, share_proofs
from mulki.ops.proofs import Verdict
from tests.ranks import run_ranks

SUBJECT = {"gpu": "a card", "torch": "1"}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(proofs, "subjects", lambda device_type: [SUBJECT])
    return tmp_path / "cache"


def everywhere(**changes: Verdict) -> list[Verdict]:
    sizes = {size: Verdict("siglip", "float32", size, (), 2.0, 2.0) for size in proofs.SIZES}
    return list((sizes | changes).values())


def test_size_of_a_call() -> None:
    assert [proofs.size_of(*shape) for shape in ((0, 5), (64, 100), (1, 1 << 17))] == ["small"] * 3
    assert proofs.size_of(2, 1 << 17) == "medium"
    assert proofs.size_of(1 << 11, 1 << 11) == "medium"
    assert proofs.size_of(65536, 65536) == "large"


def test_without_a_proof_the_remedy_is_named() -> None:
    assert "mulki prove" in str(proofs.why_not("siglip", "cuda", torch.float32, "small"))


def test_a_proof_is_kept(folder: Path) -> None:
    path = proofs.store(SUBJECT, everywhere())
    assert path.parent == folder / "proofs"
    assert proofs.why_not("siglip", "cuda", torch.float32) is None
    assert proofs.why_not("siglip", "cuda", torch.float32, "large") is None
    reason = proofs.why_not("siglip", "cuda", torch.bfloat16, "small")
    assert reason is not None and "bfloat16 at small" in reason
    assert proofs.why_not("contrastive", "cuda", torch.float32, "small") is not None


def test_what_is_wrong_or_slower_is_not_taken() -> None:
    verdicts = everywhere(
        small=Verdict("siglip", "float32", "small", speedup=0.5),
        medium=Verdict("siglip", "float32", "medium", ("loss: relative error 3",), 2.0),
    )
    proofs.store(SUBJECT, verdicts)
    slower, wrong, good = (
        proofs.why_not("siglip", "cuda", torch.float32, size) for size in proofs.SIZES
    )
    assert slower is not None and "slower" in slower and "0.50" in slower
    assert wrong is not None and "relative error 3" in wrong
    assert good is None
    # Asked for all sizes, the first reason is the answer.
    assert proofs.why_not("siglip", "cuda", torch.float32) == slower


def test_what_did_not_run_is_not_wrong() -> None:
    reason = Verdict("siglip", "float32", "small", failure="signal 11").why_not()
    assert reason is not None and "did not run" in reason and "--again" in reason
    assert not reason.startswith(proofs.WRONG)


def test_a_case_that_was_not_timed_is_not_faster() -> None:
    for gradients in (True, False, None):
        assert Verdict("siglip", "float32", "small").why_not(gradients) is not None
    assert "without gradients" in str(Verdict("siglip", "float32", "small", (), 2.0).why_not())


def test_calls_without_gradients_are_served_where_these_are_faster() -> None:
    verdicts = everywhere(
        small=Verdict("siglip", "float32", "small", (), 2.0, 0.5),
        medium=Verdict("siglip", "float32", "medium", (), 0.5, 2.0),
    )
    proofs.store(SUBJECT, verdicts)

    def served(gradients: bool | None) -> list[bool]:
        of_sizes = (("siglip", "cuda", torch.float32, size, gradients) for size in proofs.SIZES)
        return [proofs.why_not(*one) is None for one in of_sizes]

    assert served(True) == [True, False, True]
    assert served(False) == [False, True, True]
    assert served(None) == [False, False, True]


def test_every_kind_of_gpu_needs_its_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    other = SUBJECT | {"gpu": "another card"}
    monkeypatch.setattr(proofs, "subjects", lambda device_type: [SUBJECT, other])
    proofs.store(SUBJECT, everywhere())
    assert proofs.why_not("siglip", "cuda", torch.float32) is not None
    proofs.store(other, everywhere())
    assert proofs.why_not("siglip", "cuda", torch.float32) is None
    monkeypatch.setattr(proofs, "subjects", lambda device_type: [])
    assert proofs.why_not("siglip", "cuda", torch.float32) is not None


def test_a_speedup_that_is_no_number_permits_nothing() -> None:
    assert Verdict("siglip", "float32", "small", speedup=float("nan")).why_not() is not None


def test_float32_is_proven_both_ways_and_bfloat16_is_not_concerned() -> None:
    proofs.store(SUBJECT, everywhere())
    half = [Verdict("siglip", "bfloat16", size, (), 2.0, 2.0) for size in proofs.SIZES]
    proofs.store(SUBJECT, half)
    matmul = torch.backends.cuda.matmul
    kept = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        assert "in tf32 at small" in str(proofs.why_not("siglip", "cuda", torch.float32, "small"))
        assert proofs.why_not("siglip", "cuda", torch.bfloat16) is None
        proofs.store(SUBJECT, [Verdict("siglip", "tf32", "small", (), 2.0, 2.0)])
        assert proofs.why_not("siglip", "cuda", torch.float32, "small") is None
    finally:
        matmul.fp32_precision = kept
    assert proofs.why_not("siglip", "cuda", torch.float32) is None


def test_an_older_torch_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda, "matmul", object())
    assert proofs.numbers_of(torch.float32) == "float32"


# --- what a proof is of


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without Triton, too."""
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.9"))
    proofs._versions.cache_clear()
    yield
    proofs._versions.cache_clear()


def test_the_subject(versions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's version is its own, whatever its distribution is called."""
    before = proofs.subject_of("a card")
    assert before["triton"] == "3.9" and before["gpu"] == "a card"
    monkeypatch.setenv("MULKI_INPUT_PRECISION", "ieee")
    assert proofs.subject_of("a card") != before


def test_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    of_nvidia, of_amd = tmp_path / "nvidia", tmp_path / "amdgpu"
    monkeypatch.setattr(proofs, "_DRIVERS", (of_nvidia, of_amd))
    assert proofs._driver() == platform.release()
    of_amd.write_text("6.12.12\n")
    assert proofs._driver() == "6.12.12"
    of_nvidia.write_text("NVRM version: 570\nGCC version: 12\n")
    assert proofs._driver() == "NVRM version: 570"


def test_words_do_not_change_the_digest_and_code_does(tmp_path: Path) -> None:
    file = tmp_path / "kernel.py"

    def digest(text: str) -> str:
        file.write_text(text)
        return proofs._digest(tmp_path)

    code = "def f(x):\n    return x + 1\n"
    words = '"""A kernel."""\n\ndef f(x):  # adds\n    """One more."""\n    return x + 1\n'
    assert digest(code) == digest(words) != digest(code.replace("1", "2"))


def test_each_kind_of_card_is_one_subject(versions: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # of `subjects`
    monkeypatch.setitem(sys.modules, "triton", types.SimpleNamespace(__version__="3.9"))
    names = ["A100", "H100", "A100"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(names))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: names[i])
    assert {name: str(card) for name, card in proofs.cards("cuda").items()} == {
        "A100": "cuda:0",
        "H100": "cuda:1",
    }
    assert [subject["gpu"] for subject in proofs.subjects("cuda")] == ["A100", "H100"]
    assert [subject["gpu"] for subject in proofs.subjects("cuda:2")] == ["A100"]


# --- processes


def _chosen(rank: int, world: int, folder: str, subjects: list[dict[str, str]]) -> list[bool]:
    """Whether a rank has a proof, before and after those of the first rank were shared."""
    # The first rank alone has them, as on a machine with a cache of its own.
    os.environ["MULKI_CACHE_DIR"] = folder if rank == 0 else f"{folder}-of-{rank}"
    with mock.patch.object(proofs, "subjects", lambda device: [subjects[rank]]):
        found = []
        for share in (False, True):
            if share:
                share_proofs()
            found.append(proofs.why_not("siglip", "cuda", torch.float32) is None)
    return found


def test_ranks_take_the_proofs_of_the_first(folder: Path) -> None:
    proofs.store(SUBJECT, everywhere())
    same, other = [SUBJECT] * 2, [SUBJECT, SUBJECT | {"gpu": "another card"}]
    assert run_ranks(2, _chosen, str(folder), same) == [[True, True], [False, True]]
    # What holds for one kind of GPU says nothing of another.
    assert run_ranks(2, _chosen, str(folder), other) == [[True, True], [False, False]]


# --- files


def test_another_version_needs_another_proof() -> None:
    proofs.store(SUBJECT, everywhere())
    assert proofs.stored(SUBJECT | {"torch": "2"}) is None


def test_verdicts_are_kept_beside_earlier_ones_of_other_places() -> None:
    proofs.store(SUBJECT, everywhere())
    proofs.store(SUBJECT | {"gpu": "another"}, everywhere())
    changed = Verdict("siglip", "float32", "small", speedup=0.5)
    added = Verdict("siglip", "bfloat16", "small", speedup=3.0)
    proofs.store(SUBJECT, [changed, added])
    found = proofs.stored(SUBJECT)
    assert found is not None and len(found) == len(proofs.SIZES) + 1
    assert found[changed.place] == changed and found[added.place] == added
    other = proofs.stored(SUBJECT | {"gpu": "another"})
    assert other is not None and other[changed.place].speedup == 2.0


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"subject": 3}', "\xff", '{"subject": {"gpu": "a card", "torch": "1"}}'],
)
def test_a_damaged_file_is_no_proof_and_is_written_anew(text: str) -> None:
    path = proofs.proof_file(SUBJECT)
    path.parent.mkdir(parents=True)
    path.write_text(text, encoding="latin-1")
    assert proofs.stored(SUBJECT) is None
    proofs.store(SUBJECT, everywhere())
    assert proofs.stored(SUBJECT) is not None


def test_the_proof_of_another_subject_in_its_place_is_none() -> None:
    proofs.store(SUBJECT, everywhere())
    other = SUBJECT | {"gpu": "another"}
    proofs.proof_file(SUBJECT).rename(proofs.proof_file(other))
    assert proofs.stored(other) is None
