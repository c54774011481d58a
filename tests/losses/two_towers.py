"""A tiny model with two towers, two teachers, and the losses of its whole batch in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import open_clip.loss
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki import losses

WIDTH = 5
# Rows of each rank, by the number of ranks.
UNEVEN = {1: [5], 2: [5, 2], 3: [3, 0, 4], 4: [2, 0, 3, 1]}
Output = dict[str, Tensor]


class TwoTowers(nn.Module):
    """What open_clip's models return, with a logit bias."""

    def __init__(self, width: int = WIDTH, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.visual = nn.Linear(7, width)
        self.text = nn.Linear(6, width)
        self.logit_scale = nn.Parameter(torch.tensor(1.8))
        self.logit_bias = nn.Parameter(torch.tensor(-2.0))

    def forward(self, images: Tensor, texts: Tensor) -> Output:
        return {
            "image_features": F.normalize(self.visual(images), dim=1),
            "text_features": F.normalize(self.text(texts), dim=1),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
        }


def batch(n: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, texts = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (7, 6))
    return images.to(dtype), texts.to(dtype)


def teacher(prefix: str, images: Tensor, texts: Tensor, width: int) -> Output:
    seed = {"dist_": 1, "prev_": 2}[prefix]
    with torch.no_grad():
        out = TwoTowers(width, seed).to(images.dtype)(images, texts)
    return {prefix + name: value for name, value in out.items()}


def extra(kind: str, images: Tensor, texts: Tensor, gate: str = "") -> Output:
    """What the teachers of a loss say."""
    out: Output = {}
    if kind in ("distill", "dual"):
        out |= teacher("dist_", images, texts, WIDTH + 2)
    if kind == "dual":
        width = WIDTH + 2 if gate == "discrepancy" else WIDTH - 1
        out |= teacher("prev_", images, texts, width)
    return out


OURS: dict[str, Callable[..., nn.Module]] = {
    "clip": losses.ClipLoss,
    "siglip": losses.SigLipLoss,
    "distill": losses.DistillClipLoss,
    "dual": losses.DualTeacherClipLoss,
}


def rows_of(kind: str, out: Output, **options: Any) -> dict[str, Tensor]:
    """The losses of each pair of the whole batch, [N], by name."""
    if kind == "siglip":
        z = logits(out) + out["logit_bias"]
        signs = 2 * torch.eye(len(z), dtype=z.dtype) - 1
        return {"contrastive_loss": -F.logsigmoid(signs * z).sum(1)}
    z, y = logits(out), torch.arange(len(out["image_features"]))
    rows = {
        "contrastive_loss": (
            F.cross_entropy(z, y, reduction="none") + F.cross_entropy(z.T, y, reduction="none")
        )
        / 2
    }
    prefixes = {"clip": [], "distill": ["dist_"], "dual": ["dist_", "prev_"]}[kind]
    if prefixes:
        t = options.get("temperature", 2.0 if kind == "dual" else 1.0)
        by_side = [soft_rows(out, prefixes, t, side, **options) for side in (0, 1)]
        rows["distill_loss"] = sum(by_side) / 2
    return rows


def soft_rows(
    out: Output, prefixes: list[str], t: float, side: int, gate: str = "label", **_: Any
) -> Tensor:
    """The weighted soft cross-entropy of each image (side 0) or text (side 1)."""

    def log_q(prefix: str) -> Tensor:
        z = logits(out, prefix)
        return F.log_softmax((z.T if side else z) / t, dim=1)

    log_p = [log_q(prefix) for prefix in prefixes]
    crosses = torch.stack([-(p.exp() * log_q("")).sum(1) for p in log_p], 1) * t**2
    entropies = torch.stack([-(p.exp() * p).sum(1) for p in log_p], 1)
    if len(prefixes) == 1 or gate == "uniform":
        weights = torch.full_like(crosses, 1 / len(prefixes))
    elif gate == "confidence":
        weights = F.softmax(-entropies, dim=1)
    elif gate == "label":
        weights = F.softmax(torch.stack([p.diagonal() for p in log_p], 1), dim=1)
    else:
        kind = "text_features" if side else "image_features"
        gap = (out[prefixes[0] + kind] - out[prefixes[1] + kind]).norm(dim=1)
        previous = torch.sigmoid(6 * (gap - 0.2))
        weights = torch.stack([1 - previous, previous], 1)
    return (weights * crosses).sum(1)


def logits(out: Output, prefix: str = "") -> Tensor:
    images, texts, scale = (
        out[prefix + name] for name in ("image_features", "text_features", "logit_scale")
    )
    return scale * images @ texts.T


OPEN_CLIP = {
    "clip": open_clip.loss.ClipLoss,
    "siglip": open_clip.loss.SigLipLoss,
    "distill": open_clip.loss.DistillClipLoss,
}


def truth(kind: str, n: int, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of every pair, and the gradients of the parameters, of one process in float64."""
    model = TwoTowers().double()
    images, texts = batch(n)
    out = model(images, texts) | extra(kind, images, texts, options.get("gate", ""))
    rows = rows_of(kind, out, **options)
    sum(one.mean() for one in rows.values()).backward()
    return {name: one.detach() for name, one in rows.items()}, gradients(model)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


def outputs(
    kind: str, n: int = 6, gate: str = "label", dtype: torch.dtype = torch.float64
) -> tuple[TwoTowers, Output]:
    """A model, and what it and the teachers return."""
    model = TwoTowers().to(dtype)
    images, texts = batch(n, dtype)
    return model, model(images, texts) | extra(kind, images, texts, gate)


def own(tensor: Tensor, sizes: list[int], rank: int) -> Tensor:
    """The rows of this rank."""
    return tensor.split(sizes)[rank]
