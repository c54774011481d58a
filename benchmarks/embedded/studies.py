"""What is run on the bundled tasks: tuning grids, the comparison, the ablation.

A run is a dict of options for `mulki.engine.config.resolve`, without the ones every run shares.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

Options = dict[str, Any]

METHODS = ("zero_shot", "finetune", "lwf", "mulki")
ORDERS = ("I", "II")
SEEDS = (0, 1, 2)

# Tuning sees the first three tasks of order I alone, and of those the training images alone, some
# of them held out to test on. So no test image, and nothing of the other three tasks, has a say in
# learning rates and weights. Its seed is none of the comparison's.
TUNING_TASKS = ("embedded:digits", "embedded:animals", "embedded:letters")
TUNING_SEED = 100

MULKI_STAGES = {
    "without Eliciting (no prototypes)": {"eliciting": False},
    "without Adding (no distillation)": {"adding": False},
    "without Distinguishing (uniform weights)": {"distinguishing": False},
    "without Connecting (last weights)": {"connecting": False},
    "Connecting alone (fine-tuning, running mean)": {
        "eliciting": False,
        "adding": False,
        "distinguishing": False,
    },
}
# Forms of MulKI are compared on orders that nothing is reported on. All but the first two have what
# the third has, and differ from it in what they name.
FORM_ORDERS = ("III", "IV")
_ANCHORED = {"lr": 2e-4, "anchors": "vocabulary", "image_anchor": 0.5}
FORMS: dict[str, Options] = {
    "without anchors": {},
    "without anchors, lr 2e-4": {"lr": 2e-4},
    "vocabulary": _ANCHORED,
    "vocabulary, coefficient 1.5": _ANCHORED | {"image_anchor": 1.5},
    "vocabulary, student's texts": _ANCHORED | {"anchor_texts": "student"},
    "vocabulary, original model alone": _ANCHORED | {"anchor_weights": "group"},
    "seen classes": _ANCHORED | {"anchors": "seen"},
    "both": _ANCHORED | {"anchors": "both"},
    "both, a teacher for each group": _ANCHORED | {"anchors": "both", "anchor_weights": "group"},
    "without Eliciting": _ANCHORED | {"eliciting": False},
    "prototypes with the batch's means": _ANCHORED | {"prototype_update": "batch"},
    "learnable prototypes": _ANCHORED | {"prototype_update": "learnable"},
    "batch's means and images against prototypes": _ANCHORED
    | {"prototype_update": "batch", "prototype": 0.25},
    "fixed prototypes and images against them": _ANCHORED
    | {"prototype_update": "fixed", "prototype": 0.25},
    "uniform weights": _ANCHORED | {"gate": "uniform"},
    "gate temperature 0.25": _ANCHORED | {"gate_temperature": 0.25},
    "loss gate": _ANCHORED | {"gate": "loss"},
}
MULKI_TERMS = {
    "without alignment": {"alignment": 0.0},
    "without image-text": {"image_text": 0.0},
    "without image-image": {"image_image": 0.0},
    "without text-image": {"text_image": 0.0},
    "without text-text": {"text_text": 0.0},
    "without feature distance": {"feature": 0.0},
    "gate confidence": {"gate": "confidence"},
    "gate discrepancy": {"gate": "discrepancy"},
    "learnable prototypes": {"prototype_update": "learnable"},
    "interpolation with the previous model, alpha 0.8": {"alpha": 0.8},
    "anchor to the previous model, l2 0.1": {"l2": 0.1},
}


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Args:
        study: tune, compare or ablate, for tables.
        variant: what distinguishes it within the study, for tables.
        options: as above.
    """

    study: str
    variant: str
    options: Options = field(hash=False)


def tuning(method: str) -> list[Run]:
    """The grid of a method: learning rate times the weight of what it has against forgetting.

    The smallest weights were added after the first pass, whose best points lay on that edge.
    """
    rates = (3e-5, 1e-4, 2e-4, 4e-4)
    grids: dict[str, list[Options]] = {
        "finetune": [{}],
        "lwf": [{"distill_weight": w} for w in (0.1, 0.3, 1.0, 3.0)],
        "mulki": [mulki_strength(w) for w in (0.25, 0.5, 1.0, 2.0)],
    }
    runs = []
    for lr, own in product(rates, grids[method]):
        options = {"tasks": TUNING_TASKS, "seed": TUNING_SEED, "method": method, "lr": lr} | own
        runs.append(Run("tune", f"{method} lr {lr:g} {_shown(own)}".strip(), options))
    return runs


def mulki_strength(factor: float) -> Options:
    """Coefficients of every term that looks at a teacher, scaled together."""
    relations = ("image_text", "image_image", "text_image", "text_text")
    return dict.fromkeys(relations, 0.25 * factor) | {"feature": factor}


def comparison() -> list[Run]:
    """Every method at its preset, over orders and seeds."""
    return [
        Run("compare", method, {"method": method, "order": order, "seed": seed})
        for order, seed, method in product(ORDERS, SEEDS, METHODS)
        # Without training there is nothing random.
        if method != "zero_shot" or seed == SEEDS[0]
    ]


def forms() -> list[Run]:
    """MulKI's forms, over the orders that are kept apart for them."""
    return [
        Run("forms", name, {"method": "mulki", "order": order, "seed": TUNING_SEED} | form)
        for order, (name, form) in product(FORM_ORDERS, FORMS.items())
    ]


def ablation(changes: dict[str, Options], seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """MulKI with one change at a time, over orders and seeds; `comparison` has it unchanged."""
    return [
        Run("ablate", name, {"method": "mulki", "order": order, "seed": seed} | change)
        for order, seed, (name, change) in product(ORDERS, seeds, changes.items())
    ]


def _shown(options: Options) -> str:
    return " ".join(f"{name}={value:g}" for name, value in options.items())
