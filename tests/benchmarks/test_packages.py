"""Other packages, as small modules with their interfaces."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import benchmarks.ops.packages  # noqa: F401
from mulki.bench.cases import Case
from mulki.bench.point import measure_case
from mulki.bench.providers import PROVIDERS

LIGER = """
import torch
import torch.nn.functional as F

def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None,
        ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
        softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
        return_token_accuracy=False, return_predicted_tokens=False, chunk_mem_const=1):
    return F.cross_entropy(input @ weight.T, target, reduction=reduction)

def liger_fused_linear_kl_div(student_input, student_weight, target, shift_labels=None,
        reduction="batchmean", ignore_index=-100, temperature=1.0, eps=1e-10, accum_dtype=None):
    assert not target.requires_grad and accum_dtype == torch.float32
    log_q = F.log_softmax(student_input @ student_weight.T / temperature, dim=1)
    return F.kl_div(log_q, target, reduction=reduction)
"""


CCE = """
import torch.nn.functional as F

def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean",
        shift=False, filter_eps="high", impl="cce"):
    assert e.is_contiguous()
    return F.cross_entropy(e.float() @ c.float().T, targets, reduction=reduction)
"""


MEMEFF = """
import torch
import torch.nn.functional as F

class MemoryEfficientCLIPLoss(torch.nn.Module):
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0,
            label_smoothing=0.0):
        super().__init__()
        assert normalized_inputs and not stable and isinstance(temperature, float)
        self.temperature = temperature

    def forward(self, image_features, text_features, tau_plus=None):
        z = image_features.float() @ text_features.float().T / self.temperature
        labels = torch.arange(len(z))
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages with the peers' signatures and plain PyTorch inside."""
    files = {
        "liger_kernel/__init__.py": "",
        "liger_kernel/transformers/__init__.py": "",
        "liger_kernel/transformers/functional.py": LIGER,
        "cut_cross_entropy/__init__.py": CCE,
        "memeff/__init__.py": MEMEFF,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    tops = ("liger_kernel", "cut_cross_entropy", "memeff")
    before = {name for name in sys.modules if name.partition(".")[0] in tops}
    assert not before
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "operator", "dtype"),
    [
        ("liger", "prototype_cross_entropy", "float32"),
        ("liger", "teacher_kl_1", "float32"),
        ("liger", "teacher_kl_3", "float32"),
        ("cce", "prototype_cross_entropy", "bfloat16"),
        ("memeff", "contrastive", "float32"),
    ],
)
def test_peers_are_called_as_they_ask(packages: None, name: str, operator: str, dtype: str) -> None:
    case = Case(operator, 9, 9, 16, dtype)
    (result,) = measure_case(case, (name,), ("both",), seconds=1e-9)
    assert result.status == "timed", result.notes
    assert "gradient_error" in result.metrics and result.notes


@pytest.mark.parametrize(
    ("name", "operator", "dtype", "reason"),
    [
        ("liger", "dual_teacher_kl", "bfloat16", "no weight per row"),
        ("liger", "siglip", "bfloat16", "neither"),
        ("cce", "siglip", "bfloat16", "cross-entropy alone"),
        ("cce", "prototype_cross_entropy", "float32", "half precision"),
        ("memeff", "siglip", "bfloat16", "contrastive loss alone"),
    ],
)
def test_what_peers_do_not_have(
    packages: None, name: str, operator: str, dtype: str, reason: str
) -> None:
    assert reason in str(PROVIDERS[name].refusal(Case(operator, 4, 4, 8, dtype)))


def test_an_older_liger_has_no_kl(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import liger_kernel.transformers.functional as functional

    monkeypatch.delattr(functional, "liger_fused_linear_kl_div")
    reason = PROVIDERS["liger"].refusal(Case("teacher_kl_1", 4, 4, 8, "float32"))
    assert reason == "liger-kernel has no liger_fused_linear_kl_div"


def test_why_a_peer_is_not_here(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    absence = PROVIDERS["memeff"].absence
    assert absence("cpu") == "wants a CUDA GPU" and absence("cuda") is None
    monkeypatch.undo()  # the packages are off the path again
    assert absence("cuda:1") == "memeff is not installed"


def test_ours_come_last() -> None:
    names = list(PROVIDERS)
    assert names.index("memeff") < names.index("mulki") and names[-1] == "mulki-reference"
