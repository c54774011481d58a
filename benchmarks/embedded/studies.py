"""What is run on the bundled tasks: what chooses, and the comparison.

A run is a dict of options for `mulki.train.config.run_config.resolve`, without the ones every run
shares.

The rules; the first was written down before any of the runs, the others later:

- Tuning sees the first three tasks of order I alone, and of those the training images alone, some
  of them held out to test on. Its criterion is the mean of Transfer, Average and Last, over two
  seeds that no result is reported of. Every method but MulKI has twelve points. A grid whose best
  point lies on its edge is moved on by one row or column, for every method that this happens to.
- Six tasks forget more than three. So the strength of every method with teachers is chosen again
  on orders III and IV, on held-out training images and by the same criterion: 1, 2, 6 times the
  weights of its best point, and on until the best is not the last. That one goes on was added
  when 6 times was the best of nearly all; that one goes down where 1 is the best was not (`AGAIN`).
- This was with label smoothing 0.2. Then each method was run there without it and with 0.1. Each
  was best without, so none has any. `er`, `ewc` and `keeplora`, which have no teachers, came later
  and were tuned without it.
- Forms of MulKI are chosen there too, without label smoothing. That is more choice than the other
  methods have.
- So learning rates and strengths of the other methods were chosen under other conditions than
  those of the results. Each row of the six orders' table is run on orders III and IV once more as
  results are made, with half and twice its rate and its strength (`AGAIN`), MulKI's rows later
  than the others. A point takes the place of the preset where its criterion is higher by more than
  0.67, which is what two of them must differ by: of MulKI's forms the difference between the two
  orders has a standard deviation of 0.46. This was written before these runs.
- By that rule fine-tuning has half its rate, and so has Select-and-Distill on the task's own
  images; on made images it would keep its rate. But there, with half of it, it is level by the
  criterion, and keeps 0.7 points more of Transfer, as much as MulKI. So that this is seen on test
  images too, it is a row of its own of the six orders' table (written before its runs).
- Every run has the preset ``small``, with half a batch, so that all of it takes hours and not days.
- Results are reported on six orders, the last two of which were drawn at random, and on two
  class-incremental sequences. A seed is complete before the next one begins.
- The start model with a transformer has the weights that each method has on the bundled one, and
  half of the steps. The learning rate alone is chosen again, in the tuning's tasks, as a share of
  that of the bundled model, with one seed. What MulKI's stages give on it is seen in those tasks
  too, with the rate that was best with all of them; nothing was chosen by it.

MulKI's first form, of which no run is left here (commit 4935d05 has them), was tuned like the
others. Its results and its ablation on orders I and II and on the sequences, where
Select-and-Distill was ahead, prompted the search for other forms. So the test images had that much
of a say; the drawn orders are other orders of the same images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from typing import Any

from mulki.clip.models import BUNDLED
from mulki.data.made_images import DEFAULT_CHANGES
from mulki.train.config import presets

Options = dict[str, Any]

# What each method is given beside the tasks: the vocabulary, or captions made of it.
CURRENT: Options = {"reference": "current"}
METHODS: dict[str, Options] = {
    "zero_shot": {},
    "finetune": {},
    "wise_ft": {},
    "lwf": {},
    "lwf_vr": {},
    # A running mean as MulKI's was: its own 100 steps are more than a task has here.
    "zscl": CURRENT | {"we_every": 10},
    "snd": CURRENT,
    "mulki": {},
    "er": {},
    "ewc": {},
    "keeplora": {"lora_rank": 16},
}

# Held on images made of the task's own, in place of the task's own.
MADE: Options = {"reference": "made"}

# Rates that presets had before a point of `again` replaced them. On made images none was clear, but
# a method has one preset.
BEFORE_AGAIN: dict[str, Options] = {"finetune": {"lr": 1e-4}, "snd": {"lr": 2e-4}}

# Rows of the comparison: a method, and what differs from its preset.
ROWS: dict[str, Options] = {
    **{name: {"method": name} for name in METHODS},
    "zscl, made images": MADE | {"method": "zscl"},
    "snd, made images": MADE | {"method": "snd"} | BEFORE_AGAIN["snd"],
    "snd, made images, half the rate": MADE | {"method": "snd"},
    # The best of its forms with adapters (`HELD`).
    "mulki, adapters": {"method": "mulki", "lora_rank": 16, "lr": 1.6e-3, "l2": 0.0}
    | {"feature": 4.5, "feature_original": 0.25},
}
DRAWN_ROWS = ("finetune", "lwf", "lwf_vr", "snd", "snd, made images", "mulki")
SEEDS = (0, 1, 2)
FORM_ORDERS = ("III", "IV")
ORDERS = (
    *("I", "II", *FORM_ORDERS),
    "emoji,letters,animals,clipart,digits,flags",
    "digits,emoji,letters,flags,animals,clipart",
)
# The steps of a class-incremental sequence are small, so they take fewer iterations than a task,
# and a running mean has fewer steps between its members, so that there are about as many.
SEQUENCES: dict[str, tuple[Options, int]] = {
    "embedded-flags": ({"tasks": ("embedded-flags",), "iterations": 16}, 2),
    "embedded-glyphs": ({"tasks": ("embedded-glyphs",), "iterations": 32}, 5),
}

# Studies by which something is chosen: no figure of them is of test images.
CHOICES = ("tune", "strength", "smoothing", "held", "again", "changes", "vit_rates", "vit_stages")
# Studies of the start model with a transformer.
OF_VIT = ("vit_rates", "vit_stages", "vit")
TUNING_TASKS = ("embedded:digits", "embedded:animals", "embedded:letters")
TUNING_SEEDS = (100, 101)

# Of each method, at the best point and strength that it had with 0.2; of those with a reference set
# also on images made of the task's own.
SMOOTHINGS = (0.0, 0.1, 0.2)

# MulKI's forms. The first six came first; the others begin from the best of those.
_HELD: Options = (
    {"method": "mulki", "lr": 2e-4, "label_smoothing": 0.0, "l2": 0.0, "alignment": 0.0}
    | {"hold_on": "made", "reference": "made", "gate": "discrepancy"}
    | {"image_text": 0.0, "image_image": 0.0, "text_image": 0.0, "text_text": 0.0}
    | {"image_anchor": 0.0, "feature": 9.0, "feature_original": 0.5}
)
_ANCHORS: Options = {"image_anchor": 0.5}
_BEST: Options = _HELD | {"alignment": 0.25, "l2": 0.1}
_ADAPTED: Options = _BEST | _ANCHORS | {"lora_rank": 16}
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
    "without distillation": _BEST | {"adding": False},
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
    "anchors 0.5, without l2": _BEST | _ANCHORS | {"l2": 0.0},
    "anchors 0.5, without l2, text to text 0.25": _BEST | _ANCHORS | {"l2": 0.0, "text_text": 0.25},
    "anchors 0.5, lower rates of the first layers, 0.2": _BEST | _ANCHORS | {"lr_first_layer": 0.2},
    "anchors 0.5, lower rates of the first layers, 0.5": _BEST | _ANCHORS | {"lr_first_layer": 0.5},
    **{
        f"anchors 0.5, adapters of rank 16, lr {lr:g}": _ADAPTED | {"lr": lr}
        for lr in (4e-4, 8e-4, 1.6e-3, 3.2e-3, 6.4e-3)
    },
    "anchors 0.5, adapters of rank 16, lr 0.0016, without l2": _ADAPTED | {"lr": 1.6e-3, "l2": 0.0},
    "anchors 0.5, adapters of rank 16, lr 0.0016, without l2, features half as strong": _ADAPTED
    | {"lr": 1.6e-3, "l2": 0.0, "feature": 4.5, "feature_original": 0.25},
    "label smoothing 0.1": _BEST | {"label_smoothing": 0.1},
    "label smoothing 0.2": _BEST | {"label_smoothing": 0.2},
}

# How strongly a row of the comparison holds: the half and the double of what it has, and for
# KeepLoRA the energies next to its own in its grid. Fine-tuning has its learning rate alone.
_SND_WEIGHTS: list[Options] = [
    {"previous_weight": 9 * w, "zero_shot_weight": 0.5 * w} for w in (0.5, 2.0)
]
AGAIN: dict[str, list[Options]] = {
    "snd, made images": _SND_WEIGHTS,
    "snd": _SND_WEIGHTS,
    "lwf_vr": [{"distill_weight": w} for w in (0.9, 3.6)],
    "ewc": [{"ewc_lambda": w} for w in (5e3, 2e4)],
    "er": [{"replay_weight": w} for w in (0.5, 2.0)],
    "keeplora": [{"energy_image": e} for e in (0.7, 0.95)],
    "finetune": [],
    "mulki": [
        {"feature": 9 * w, "feature_original": 0.5 * w, "image_anchor": 0.5 * w} for w in (0.5, 2.0)
    ],
    "mulki, adapters": [
        {"feature": 4.5 * w, "feature_original": 0.25 * w, "image_anchor": 0.5 * w}
        for w in (0.5, 2.0)
    ],
}

# The forms of MulKI that are rows.
FORMS = {
    "mulki": "anchors 0.5",
    "mulki, adapters": "anchors 0.5, adapters of rank 16, lr 0.0016, without l2, "
    "features half as strong",
}

# What is done to images: each change alone, and others beside the default ones.
_ALL_CHANGES = ("invert", "channels", "average", "enlarge", "cutmix", "blocks", "crop", "noise")
CHANGED: dict[str, tuple[str, ...]] = {
    "the default ones": DEFAULT_CHANGES,
    **{name: (name,) for name in _ALL_CHANGES},
    "all": _ALL_CHANGES,
    "without noise": _ALL_CHANGES[:-1],
}


# MulKI by what weighs its teachers, in a sequence of related steps, where the previous model is far
# better than the original one. Nothing was chosen by it: it is tested on test images.
_OWN: Options = {"hold_on": "task"}
GATES: dict[str, Options] = {
    "mulki": {},
    "equal weights": {"gate": "uniform", "feature_original": 0.5},
    "confidence": {"gate": "confidence", "feature_original": 0.5},
    "previous model alone, features 4": {"teachers": "previous", "gate": "uniform", "feature": 4.0}
    | {"feature_original": None},
    "own images": _OWN,
    **{
        f"own images, {shown}": _OWN | {"gate": gate, "feature_original": 0.5}
        for gate, shown in (("uniform", "equal weights"), ("label", "label"), ("loss", "loss"))
    },
}


# The start model with a transformer: options of every run, shares of the bundled model's learning
# rate that were tried, and the rows of its table with the best share. Without warm-up the first
# step damages this model (docs/training.md).
VIT: Options = {"iterations": 32, "warmup": 8, "lock_text": True, "precision": "amp_bf16"}
VIT_TRIED = {
    "finetune": (0.01, 0.03, 0.1, 0.3),
    **dict.fromkeys(("lwf_vr", "snd, made images", "keeplora", "mulki"), (0.03, 0.1, 0.3)),
    "mulki, adapters": (0.1, 0.3, 1.0, 3.0),
}
VIT_SHARES = {
    "finetune": 0.03,
    "lwf_vr": 0.1,
    "snd, made images": 0.1,
    "keeplora": 0.1,
    "mulki": 0.1,
    "mulki, adapters": 1.0,
}
VIT_ORDERS = ("I", "II")
# MulKI on it with one thing changed.
VIT_STAGES: dict[str, Options] = {
    "mulki": {},
    "without alignment": {"alignment": 0.0},
    "without l2": {"l2": 0.0},
    "without text anchors": {"image_anchor": 0.0},
    "anchors 1.5 in place of features": {"image_anchor": 1.5, "feature": 0.0}
    | {"feature_original": 0.0},
    "equal weights": {"gate": "uniform"},
    "previous teacher alone, features 4": _UNIFORM | {"feature": 4.0, "teachers": "previous"},
    "image to prototype 0.25": {"image_image": 0.25},
    "image to text 0.25": {"image_text": 0.25},
    "on the task's own images": {"hold_on": "task"},
    "running mean in place of l2": {"l2": 0.0, "we_every": 5},
    "lower rates of the first layers, 0.5": {"lr_first_layer": 0.5},
}


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Args:
        study: one of `CHOICES`, or compare, gates or vit, for tables.
        variant: what distinguishes it within the study, for tables.
        options: as above.
        model: the start model, as `mulki run` takes it.
    """

    study: str
    variant: str
    options: Options = field(hash=False)
    model: str = BUNDLED


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
    # Its first grid had 4e-4 in place of 2.5e-5, and its best point at 5e-5.
    "er": [{"lr": lr, "replay_weight": w} for lr in _LOW_RATES for w in (0.3, 1.0, 3.0)],
    "ewc": [{"lr": lr, "ewc_lambda": w} for lr in _RATES for w in (1e3, 1e4, 1e5)],
    # Adapters of rank 16 take higher rates than all weights. Its first grid had 2e-4 in place of
    # 3.2e-3, and its best point at 1.6e-3.
    "keeplora": [
        {"lr": lr, "energy_image": e}
        for lr in (4e-4, 8e-4, 1.6e-3, 3.2e-3)
        for e in (0.7, 0.85, 0.95)
    ],
}
# Tuned without label smoothing; the others with 0.2, that of ZSCL's code.
TUNED_WITHOUT_SMOOTHING = ("er", "ewc", "keeplora")
# Best points of the methods with teachers; what is not a learning rate is a weight.
TUNED: dict[str, Options] = {
    "lwf": {"lr": 5e-5, "distill_weight": 0.1},
    "lwf_vr": {"lr": 1e-4, "distill_weight": 0.3},
    "zscl": {"lr": 1e-4, "image_loss": 0.1, "text_loss": 0.1},
    "snd": {"lr": 2e-4, "previous_weight": 9.0, "zero_shot_weight": 0.5},
}
# The best of LwF was 18.
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


def strengths(method: str) -> list[Run]:
    """A method's best point and stronger ones, over the orders that are kept apart."""
    points = [at(method, strength) for strength in STRENGTHS[method]]
    given = _as_tuned(method)
    return _kept_apart("strength", {f"{method} {_shown(of)}": given | of for of in points})


def smoothing(method: str) -> list[Run]:
    """A method at its best strength, by label smoothing, over the orders that are kept apart."""
    given = {"method": method} | METHODS[method] | _preset_before_again(method)
    kinds = {"": given}
    if "reference" in given:
        kinds[", made images"] = given | MADE
    points = {
        f"{method} label_smoothing={value:g}{kind}": options | {"label_smoothing": value}
        for value, (kind, options) in product(SMOOTHINGS, kinds.items())
    }
    return _kept_apart("smoothing", points)


def held() -> list[Run]:
    """MulKI's forms without label smoothing, over the orders that are kept apart."""
    return _kept_apart("held", HELD)


def again() -> list[Run]:
    """Every row by its learning rate and by how strongly it holds, as results are made."""
    points: dict[str, Options] = {}
    for of_rate, (row, strengths_of) in product((False, True), AGAIN.items()):
        method = ROWS[row]["method"]
        given = {"lr": _preset_before_again(method)["lr"]} | METHODS[method] | ROWS[row]
        rates = [{"lr": given["lr"] * share} for share in (0.5, 2.0)]
        for point in rates if of_rate else strengths_of:
            points[f"{row}, {_shown(point)}"] = given | point
    return _kept_apart("again", points)


def before_again(row: str) -> tuple[str, str]:
    """The study and the variant in which a row of `again` was run at its preset."""
    if row in FORMS:
        return "held", FORMS[row]
    method, *kind = row.partition(", ")
    return "smoothing", f"{method} label_smoothing=0{''.join(kind)}"


def changes() -> list[Run]:
    """MulKI at its preset, by what is done to the images it is held on."""
    given = {"method": "mulki"}
    points = {name: given | {"reference_changes": names} for name, names in CHANGED.items()}
    return _kept_apart("changes", points)


def gates(seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """MulKI by its gate, on glyphs."""
    place, _ = SEQUENCES["embedded-glyphs"]
    return [
        Run("gates", name, {"method": "mulki", "seed": seed} | place | options)
        for seed, (name, options) in product(seeds, GATES.items())
    ]


def vit_rates(model: str) -> list[Run]:
    """Learning rates of every row of the transformer's table, in the tuning's tasks."""
    place = {"tasks": TUNING_TASKS, "seed": TUNING_SEEDS[0]}
    return [
        Run("vit_rates", f"{row}, {share:g} of its rate", place | of_vit(row, share), model)
        for row, shares in VIT_TRIED.items()
        for share in shares
    ]


def vit(model: str, seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """The table of the start model with a transformer, one seed after the other."""
    rows = [
        ("zero_shot", {"method": "zero_shot"} | VIT),
        *((row, of_vit(row, share)) for row, share in VIT_SHARES.items()),
    ]
    # Most of a run is tests. The first seed's were made before they could be in bfloat16.
    return [
        Run(
            "vit",
            row,
            {"order": order, "seed": seed}
            | options
            | ({"precision_eval": "amp_bf16"} if seed else {}),
            model,
        )
        for seed, order, (row, options) in product(seeds, VIT_ORDERS, rows)
    ]


def vit_stages(model: str) -> list[Run]:
    """MulKI on the transformer with one thing changed, in the tuning's tasks, seed by seed."""
    given = {"tasks": TUNING_TASKS} | of_vit("mulki", VIT_SHARES["mulki"])
    return [
        Run("vit_stages", name, given | {"seed": seed} | form, model)
        for seed, (name, form) in product(TUNING_SEEDS, VIT_STAGES.items())
    ]


def of_vit(row: str, share: float) -> Options:
    """What a row had on the bundled model before `again`, with a share of its learning rate."""
    method = ROWS[row]["method"]
    given = _preset_before_again(method) | METHODS[method] | ROWS[row] | VIT
    return given | {"lr": float(f"{share * given['lr']:.3g}")}


def at(method: str, strength: float) -> Options:
    """A method's best point with its weights times `strength`."""
    return {
        name: value if name == "lr" else round(strength * value, 6)
        for name, value in TUNED[method].items()
    }


def comparison(seeds: tuple[int, ...] = SEEDS) -> list[Run]:
    """Every row over the orders and sequences, one seed after the other."""
    places = {order: ({"order": order}, 0) for order in ORDERS} | SEQUENCES
    runs = []
    for seed, (place, every), (name, row) in product(seeds, places.values(), ROWS.items()):
        options = METHODS[row["method"]] | row | place | {"seed": seed}
        if every and "we_every" in options:
            options["we_every"] = every
        runs.append(Run("compare", name, options))
    return runs


def _kept_apart(study: str, points: dict[str, Options]) -> list[Run]:
    # Runs by variant, over the orders that are kept apart.
    return [
        Run(study, variant, {"order": order, "seed": TUNING_SEEDS[0]} | options)
        for (variant, options), order in product(points.items(), FORM_ORDERS)
    ]


def _preset_before_again(method: str) -> Options:
    return presets.METHODS[BUNDLED, method] | BEFORE_AGAIN.get(method, {})


def _as_tuned(method: str) -> Options:
    smoothing = 0.0 if method in TUNED_WITHOUT_SMOOTHING else 0.2
    return {"method": method, "label_smoothing": smoothing} | METHODS[method]


def _shown(options: Options) -> str:
    return " ".join(f"{name}={value:g}" for name, value in options.items())
