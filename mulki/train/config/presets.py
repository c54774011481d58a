"""Presets: options that suit the bundled start model, and each method on it.

Other models get the defaults of `RunConfig`. The options of a method are those of the best point of
its grid in benchmarks/embedded/results, and of the best strength that its teachers had there
(`python -m benchmarks.embedded.compare tune`, and `strength`; the rules are in studies.py beside
it). Both saw training images alone: of the first three tasks of order I, and of orders III and IV.
`snd` has half the learning rate of that point, which was better by a later study (`again`).
MulKI has its best form on the latter (`held`), which is its default but for what is named here.
"""

from __future__ import annotations

from typing import Any

from mulki.clip.models import BUNDLED

_Options = dict[str, Any]

MODELS: dict[str, _Options] = {
    # float32: on CPUs the backward pass of depthwise convolutions is slower in bf16.
    BUNDLED: {
        "iterations": 64,
        "lr": 1e-4,
        "warmup": 0,
        "lock_text": True,
        "precision": "fp32",
    },
}
METHODS: dict[tuple[str, str], _Options] = {
    # Half the rates of their best points: later these were better (`again`), of `snd` on the task's
    # own images.
    (BUNDLED, "finetune"): {"lr": 5e-5},
    (BUNDLED, "snd"): {"lr": 1e-4, "previous_weight": 9.0, "zero_shot_weight": 0.5},
    (BUNDLED, "lwf"): {"lr": 5e-5, "distill_weight": 1.8},
    (BUNDLED, "lwf_vr"): {"lr": 1e-4, "distill_weight": 1.8},
    (BUNDLED, "wise_ft"): {"lr": 1e-4, "alpha": 0.8},
    (BUNDLED, "zscl"): {"lr": 1e-4, "image_loss": 0.6, "text_loss": 0.6},
    (BUNDLED, "er"): {"lr": 5e-5, "replay_weight": 1.0},
    (BUNDLED, "ewc"): {"lr": 1e-4, "ewc_lambda": 1e4},
    (BUNDLED, "keeplora"): {"lora_rank": 16, "lr": 1.6e-3, "energy_image": 0.85},
    # With the relation of texts it was not better (`held`).
    (BUNDLED, "mulki"): {"lr": 2e-4, "l2": 0.1, "text_text": 0.0},
}
# As many steps, so that averages over steps and learning rates mean the same.
SMALL: _Options = {"batch_size": 32}
QUICK: _Options = {"iterations": 5, "batch_size": 32, "limit_images": 120}


# How ZSCL (ICCV 2023) trains on MTIL, from its scripts: ViT-B/16 of OpenAI, which has QuickGELU.
MTIL: _Options = {
    "tasks": ("mtil",),
    "model": "ViT-B-16-quickgelu",
    "pretrained": "openai",
    "iterations": 1000,
    "batch_size": 64,
    "lr": 1e-5,
    "lr_of": ("aircraft=5e-5", "mnist=5e-5"),
    "wd": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "warmup": 100,
    "lr_scheduler": "cosine",
    "augment": "crop",
    "label_smoothing": 0.2,
}
# MulKI's relations as the paper has them, on the task's own images. Their coefficients are not
# published: these are those of a pilot on six small tasks.
RELATIONS: _Options = {
    "hold_on": "task",
    **dict.fromkeys(("image_text", "image_image", "text_image", "text_text"), 0.25),
    "image_anchor": 0.25,
    "feature": 1.0,
    "feature_original": None,
}
# The method of a recipe, and its options besides. Those of ZSCL are the defaults of its method.
# MulKI's running mean takes as many members as ZSCL's.
RECIPES: dict[str, tuple[str, _Options]] = {
    # Its images and captions are sets to be named.
    "zscl": ("zscl", {"reference": None}),
    "mulki-mtil": ("mulki", RELATIONS | {"gate": "label", "we_every": 100}),
}


def method_of(preset: Any) -> str:
    """The method of a run that names none."""
    return RECIPES[preset][0] if isinstance(preset, str) and preset in RECIPES else "mulki"


def lookup(model: str | None, method: str, preset: str) -> _Options:
    """The preset's options for a run, by option name.

    Args:
        model: the start model that the user named; None for that of the preset.
        method: of the run, whether the user or the preset named it.
        preset: its name.
    """
    if preset in RECIPES:
        own, options = RECIPES[preset]
        options = MTIL | (options if method == own else {})
        if model is not None:
            # Weights of another model.
            options = {k: v for k, v in options.items() if k not in ("model", "pretrained")}
        return MODELS.get(model or "", {}) | options
    model = model or BUNDLED
    options = MODELS.get(model, {}) | METHODS.get((model, method), {})
    return options | {"small": SMALL, "quick": QUICK}.get(preset, {})
