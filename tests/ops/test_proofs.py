"""What is kept of proofs, and when the Triton kernels are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mulki.ops import proofs
from mulki.ops.proofs import Verdict

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


def test_how_float32_is_multiplied_is_part_of_the_subject(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    before = proofs.subject_of(cpu)
    kept = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert proofs.subject_of(cpu) != before
    finally:
        torch.backends.cuda.matmul.fp32_precision = kept
    assert proofs.subject_of(cpu) == before
    monkeypatch.setenv("MULKI_INPUT_PRECISION", "ieee")
    assert proofs.subject_of(cpu) != before


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
