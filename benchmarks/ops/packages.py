"""Losses of other packages, each called as its documentation has it, added to the providers.

None of them is a dependency. A package is looked for when the benchmark starts, and imported when
it is timed. Where one has no gradient that ours has, or another form, the function says so.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mulki.bench.cases import SCALE, Case
from mulki.bench.losses import TEMPERATURE, Loss, Matrix, log_softmax
from mulki.bench.providers import PROVIDERS, Provider, autocast


def absent(package: str, device: str) -> str | None:
    """Why a package serves no case on this device, or None."""
    if torch.device(device).type != "cuda":
        return "wants a CUDA GPU"
    if importlib.util.find_spec(package) is None:
        return f"{distribution_of(package)} is not installed"
    return None


def distribution_of(package: str) -> str:
    """What a package is installed by."""
    return package.replace("_", "-")


def version(package: str) -> str:
    """The package with its version, for a note."""
    distribution = distribution_of(package)
    try:
        return f"{distribution} {importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        return distribution


# --- Liger-Kernel (github.com/linkedin/Liger-Kernel)


def _liger() -> Any:
    return importlib.import_module("liger_kernel.transformers.functional")


def liger(case: Case) -> Loss:
    """Chunks of logits, gradients in the forward pass; a teacher's probabilities are stored."""
    if case.operator == "prototype_cross_entropy":
        return _liger_cross_entropy
    return _liger_kl


def _liger_cross_entropy(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    return _liger().liger_fused_linear_cross_entropy(scale * x, w, target)


def _liger_kl(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix, ...], target: Tensor
) -> Tensor:
    kl = [
        _liger().liger_fused_linear_kl_div(
            scale * x,
            w,
            log_softmax(*teacher).exp(),
            reduction="batchmean",
            temperature=TEMPERATURE,
            accum_dtype=torch.float32,
        )
        for teacher in teachers
    ]
    return torch.stack(kl).mean() * TEMPERATURE**2


def liger_refusal(case: Case) -> str | None:
    """Why it does not apply to a case."""
    if case.operator == "prototype_cross_entropy":
        return None
    if case.operator == "dual_teacher_kl":
        return "has no weight per row and teacher"
    if not case.teachers:
        return "has neither this loss nor a part of it"
    if not hasattr(_liger(), "liger_fused_linear_kl_div"):
        return f"{version('liger_kernel')} has no liger_fused_linear_kl_div"
    return None


# --- cut-cross-entropy (github.com/apple/ml-cross-entropy)


def cut_cross_entropy(case: Case) -> Loss:
    """Tiles of logits recomputed in the backward pass; its gradient filter as it is by default."""
    of_labels: Any = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return lambda x, w, scale, target: of_labels(scale * x, w, target, reduction="mean")


def cut_cross_entropy_refusal(case: Case) -> str | None:
    """Why it does not apply to a case."""
    if case.operator != "prototype_cross_entropy":
        return "has cross-entropy alone"
    if case.dtype == "float32":
        return "takes features of half precision"
    return None


# --- memeff (github.com/b0nce/MemoryEfficientCLIP)


def memeff(case: Case) -> Loss:
    """The contrastive loss at a temperature that is a Python number."""
    module: Any = importlib.import_module("memeff")
    # `stable` would scale the gradients by something else than the loss asks for.
    of_pairs = module.MemoryEfficientCLIPLoss(
        temperature=1 / SCALE, normalized_inputs=True, stable=False
    )
    return lambda x, w, scale: of_pairs(x, w)


def memeff_refusal(case: Case) -> str | None:
    """Why it does not apply to a case."""
    return None if case.operator == "contrastive" else "has the contrastive loss alone"


_PEERS = (
    Provider(
        "liger",
        liger,
        context=autocast,
        absence=partial(absent, "liger_kernel"),
        refusal=liger_refusal,
        note=lambda case: version("liger_kernel"),
        early_gradients=True,
        peer=True,
    ),
    Provider(
        "cce",
        cut_cross_entropy,
        absence=partial(absent, "cut_cross_entropy"),
        refusal=cut_cross_entropy_refusal,
        note=lambda case: version("cut_cross_entropy"),
        peer=True,
    ),
    Provider(
        "memeff",
        memeff,
        absence=partial(absent, "memeff"),
        refusal=memeff_refusal,
        note=lambda case: f"{version('memeff')}, without a gradient to the scale",
        without=("scale",),
        peer=True,
    ),
)
# Ours come last.
_ours = {name: PROVIDERS.pop(name) for name in list(PROVIDERS) if name.startswith("mulki")}
PROVIDERS.update({provider.name: provider for provider in _PEERS} | _ours)
