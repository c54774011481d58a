"""A few steps of a small two-tower model on one large batch, as a process of its own.

    python -m benchmarks.losses.train --loss ClipLoss --batch-size 16384

prints a line of JSON: seconds of each step by the clock and of the processor (all threads), the
loss before each, and the process's peak resident memory. The towers are small on purpose: what a
step needs is the loss's. Pairs are two noisy views of a common cause, so that there is something
to learn.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip.loss
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki import losses

CAUSES, PIXELS, WORDS, HIDDEN, WIDTH = 64, 256, 128, 256, 512
LOSSES: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "mulki": {
        "ClipLoss": losses.ClipLoss,
        "SigLipLoss": losses.SigLipLoss,
        "DistillClipLoss": losses.DistillClipLoss,
        "DualTeacherClipLoss": losses.DualTeacherClipLoss,
    },
    "open_clip": {
        "ClipLoss": open_clip.loss.ClipLoss,
        "SigLipLoss": open_clip.loss.SigLipLoss,
        "DistillClipLoss": open_clip.loss.DistillClipLoss,
    },
}
TEACHERS = {
    "DistillClipLoss": {"dist_": 384},
    "DualTeacherClipLoss": {"dist_": 384, "prev_": 512},
}


class TwoTowers(nn.Module):
    """Two perceptrons with the interface of open_clip's models."""

    def __init__(self, width: int, scale: float, bias: float | None) -> None:
        super().__init__()
        self.visual, self.text = (
            nn.Sequential(nn.Linear(inputs, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, width))
            for inputs in (PIXELS, WORDS)
        )
        self.logit_scale = nn.Parameter(torch.tensor(scale).log())
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(bias))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        out = {
            "image_features": F.normalize(self.visual(images), dim=1),
            "text_features": F.normalize(self.text(texts), dim=1),
            "logit_scale": self.logit_scale.exp(),
        }
        return out if self.logit_bias is None else out | {"logit_bias": self.logit_bias}


def views(n: int) -> tuple[Tensor, Tensor]:
    causes = torch.randn(n, CAUSES)
    images, texts = (torch.tanh(causes @ torch.randn(CAUSES, d) / 4) for d in (PIXELS, WORDS))
    return tuple(x + 0.3 * torch.randn_like(x) for x in (images, texts))  # type: ignore[return-value]


def train(name: str, implementation: str, batch_size: int, steps: int) -> dict[str, Any]:
    """Steps of AdamW on one batch."""
    torch.manual_seed(0)
    siglip = name == "SigLipLoss"
    model = TwoTowers(WIDTH, 10.0 if siglip else 14.3, -10.0 if siglip else None)
    images, texts = views(batch_size)
    teachers: dict[str, Tensor] = {}
    for prefix, width in TEACHERS.get(name, {}).items():
        with torch.no_grad():
            out = TwoTowers(width, 14.3, None)(images, texts)
        teachers |= {prefix + key: value for key, value in out.items()}
    loss = LOSSES[implementation][name]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = peak_resident()
    seconds, processor, values = [], [], []
    for _ in range(steps):
        start, used = time.perf_counter(), time.process_time()
        terms = loss(**model(images, texts), **teachers, output_dict=True)
        total = sum(terms.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        seconds.append(time.perf_counter() - start)
        processor.append(time.process_time() - used)
        values.append(terms["contrastive_loss"].item())
    measured = {"seconds": seconds, "processor": processor, "losses": values}
    return measured | {"before": before, "peak": peak_resident()}


def peak_resident() -> int:
    """Bytes, the most that this process has had resident (Linux)."""
    # ru_maxrss begins with what the process that started this one had.
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--loss", choices=list(LOSSES["mulki"]), default="ClipLoss")
    parser.add_argument("--implementation", choices=list(LOSSES), default="mulki")
    parser.add_argument("--batch-size", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    print(json.dumps(train(args.loss, args.implementation, args.batch_size, args.steps)))
