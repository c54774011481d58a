"""Who computes a case: plain PyTorch, `torch.compile`, PyTorch's own fused loss, and mulki.

Another provider is one more entry of `PROVIDERS`. All are called with the arguments of `Inputs` and
return the mean loss, or the matrix of the operator similarity. The functions of plain PyTorch are
what is commonly written where no fused loss is at hand: logits stored, `log_softmax`, `kl_div`,
`cross_entropy`; the two pair losses are written as open_clip has them, one product per direction.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki import functional
from mulki.bench.cases import DTYPES, Case
from mulki.ops.backends import choose
from mulki.similarity import Similarity

Loss = Callable[..., Tensor]
Matrix = tuple[Tensor, Tensor, Tensor]  # x [N, D], w [P, D], scale

TEMPERATURE = 2.0


def _no_context(case: Case) -> AbstractContextManager[Any]:
    return nullcontext()


def _takes_all(case: Case) -> str | None:
    return None


def _no_note(case: Case) -> str:
    return ""


@dataclass(frozen=True)
class Provider:
    """One way to compute the cases."""

    name: str
    make: Callable[[Case], Loss]  # the function that is timed
    context: Callable[[Case], AbstractContextManager[Any]] = _no_context  # entered off the clock
    refusal: Callable[[Case], str | None] = _takes_all  # why it does not apply, None if it does
    note: Callable[[Case], str] = _no_note
    # Gradients are formed in the forward pass of training, so that the time of the backward pass
    # alone says nothing.
    early_gradients: Callable[[Case], bool] = lambda case: False


def logits(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    """scale x w^T, the scale on the features as open_clip has it."""
    return scale * x @ w.T


def _teacher_kl_1(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix], target: Tensor
) -> Tensor:
    return _kl_of(_log_softmax(x, w, scale), _log_softmax(*teachers[0])) * TEMPERATURE**2


def _teacher_kl_3(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix, Matrix, Matrix], target: Tensor
) -> Tensor:
    log_q = _log_softmax(x, w, scale)
    kl = [_kl_of(log_q, _log_softmax(*t)) for t in teachers]
    return torch.stack(kl).mean() * TEMPERATURE**2


def _dual_teacher_kl(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix, Matrix], target: Tensor
) -> Tensor:
    log_q = _log_softmax(x, w, scale)
    log_p = [_log_softmax(*t) for t in teachers]
    right = [t.gather(1, target.unsqueeze(1)) for t in log_p]
    weights = torch.cat(right, dim=1).softmax(dim=1)
    kl = [F.kl_div(log_q, t, reduction="none", log_target=True).sum(dim=1) for t in log_p]
    return (weights * torch.stack(kl, dim=1)).sum(dim=1).mean() * TEMPERATURE**2


def _log_softmax(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    return F.log_softmax(logits(x, w, scale) / TEMPERATURE, dim=1)


def _kl_of(log_q: Tensor, log_p: Tensor) -> Tensor:
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def _cross_entropy(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits(x, w, scale), target)


def _contrastive(x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
    labels = torch.arange(x.shape[0], device=x.device)
    images, texts = logits(x, w, scale), logits(w, x, scale)
    return (F.cross_entropy(images, labels) + F.cross_entropy(texts, labels)) / 2


def _siglip(x: Tensor, w: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = logits(x, w, scale) + bias
    signs = 2 * torch.eye(x.shape[0], dtype=z.dtype, device=z.device) - 1
    return -F.logsigmoid(signs * z).sum() / x.shape[0]


#: Plain PyTorch, by operator. In float64 these are also what the others are verified against.
EAGER: dict[str, Loss] = {
    "teacher_kl_1": _teacher_kl_1,
    "dual_teacher_kl": _dual_teacher_kl,
    "teacher_kl_3": _teacher_kl_3,
    "prototype_cross_entropy": _cross_entropy,
    "contrastive": _contrastive,
    "siglip": _siglip,
    "similarity": logits,
}


def _mulki_teacher_kl(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix, ...], target: Tensor
) -> Tensor:
    others = [Similarity(*t) for t in teachers]
    return functional.teacher_kl(Similarity(x, w, scale), others, temperature=TEMPERATURE)


def _mulki_dual_teacher_kl(
    x: Tensor, w: Tensor, scale: Tensor, teachers: tuple[Matrix, Matrix], target: Tensor
) -> Tensor:
    zero_shot, previous = (Similarity(*t) for t in teachers)
    student = Similarity(x, w, scale)
    return functional.dual_teacher_kl(
        student, zero_shot, previous, temperature=TEMPERATURE, target=target
    )


def _mulki_cross_entropy(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    return functional.prototype_cross_entropy(Similarity(x, w, scale), target)


MULKI: dict[str, Loss] = {
    "teacher_kl_1": _mulki_teacher_kl,
    "dual_teacher_kl": _mulki_dual_teacher_kl,
    "teacher_kl_3": _mulki_teacher_kl,
    "prototype_cross_entropy": _mulki_cross_entropy,
    "contrastive": functional.clip_contrastive,
    "siglip": functional.siglip,
    "similarity": functional.prototype_similarity,
}


def _autocast(case: Case) -> AbstractContextManager[Any]:
    # Stays on in the backward pass: it changes nothing there, and leaving it would be timed.
    if case.dtype == "float32":
        return nullcontext()
    return torch.autocast(torch.device(case.device).type, DTYPES[case.dtype])


def _autocast_note(case: Case) -> str:
    return "" if case.dtype == "float32" else "under autocast"


def _compiled(case: Case) -> Loss:
    # Without a reset a second shape would be compiled for any shape, which is slower.
    torch.compiler.reset()
    return torch.compile(EAGER[case.operator], fullgraph=True, dynamic=False)


def _torch_fused(case: Case) -> Loss:
    def loss(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(scale * x, w, target)

    return loss


def _torch_fused_refusal(case: Case) -> str | None:
    if case.operator != "prototype_cross_entropy":
        return "has cross-entropy alone"
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no linear_cross_entropy"
    return None


@contextmanager
def _reference(case: Case) -> Iterator[None]:
    # `use_backend` would forget which kernel serves what, and asking for it anew would be timed.
    before = os.environ.get("MULKI_BACKEND")
    os.environ["MULKI_BACKEND"] = "reference"
    try:
        yield
    finally:
        if before is None:
            del os.environ["MULKI_BACKEND"]
        else:
            os.environ["MULKI_BACKEND"] = before


def _served(case: Case) -> str:
    op = "teacher_kl" if case.teachers else case.operator
    setting = os.environ.get("MULKI_BACKEND", "auto")
    served = choose(op, torch.device(case.device).type, DTYPES[case.dtype], setting)
    reasons = "; ".join(f"{name}: {reason}" for name, reason in served.rejected.items())
    return f"served by {served.backend}" + (f" ({reasons})" if reasons else "")


def _is_loss(case: Case) -> bool:
    return case.operator != "similarity"


PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider(
            "eager",
            lambda case: EAGER[case.operator],
            context=_autocast,
            note=_autocast_note,
        ),
        Provider("compile", _compiled, context=_autocast, note=_autocast_note),
        Provider(
            "torch_lce",
            _torch_fused,
            refusal=_torch_fused_refusal,
            early_gradients=_is_loss,
        ),
        Provider(
            "mulki",
            lambda case: MULKI[case.operator],
            note=_served,
            early_gradients=_is_loss,
        ),
        Provider(
            "mulki-reference",
            lambda case: MULKI[case.operator],
            context=_reference,
            early_gradients=_is_loss,
        ),
    )
}
