"""Presets: options that suit the bundled start model, and each method on it.

Other models get the defaults of `RunConfig`. The options of a method are those of the best point of
its grid in benchmarks/embedded/results.jsonl (`python -m benchmarks.embedded.compare tune`, whose
rules are in studies.py beside it); until a grid is complete there, in results-before.jsonl, which
was made by simpler rules. Both saw training images of the first three tasks of order I alone.
"""

from __future__ import annotations

from typing import Any

from mulki.models import BUNDLED

_Options = dict[str, Any]

MODELS: dict[str, _Options] = {
    # float32: on CPUs the backward pass of depthwise convolutions is slower in bf16.
    BUNDLED: {"iterations": 64, "lr": 1e-4, "lock_text": True, "precision": "fp32"},
}
METHODS: dict[tuple[str, str], _Options] = {
    (BUNDLED, "finetune"): {"lr": 1e-4},
    (BUNDLED, "lwf"): {"lr": 5e-5, "distill_weight": 0.1},
    (BUNDLED, "lwf_vr"): {"lr": 1e-4, "distill_weight": 0.3},
    (BUNDLED, "mulki"): {
        "lr": 2e-4,
        "image_anchor": 0.25,
        "image_text": 0.0625,
        "image_image": 0.0625,
        "text_image": 0.0625,
        "text_text": 0.0625,
        "feature": 0.25,
    },
}
# As many steps, so that averages over steps and learning rates mean the same.
SMALL: _Options = {"batch_size": 32}
QUICK: _Options = {"iterations": 5, "batch_size": 32, "limit_images": 120}


def lookup(model: str, method: str, preset: str) -> _Options:
    """The preset's options for a run, by option name."""
    options = MODELS.get(model, {}) | METHODS.get((model, method), {})
    return options | {"default": {}, "small": SMALL, "quick": QUICK}[preset]
