"""The configuration of a run: its options, their defaults, and how they are combined.

Each source overrides those before it: the defaults here, the preset of the start model, the preset
of the method on that model, a YAML file, the command line. The run folder keeps the resolved
configuration as a YAML file that `--config` reads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from mulki import methods
from mulki.choices.option_files import options_in
from mulki.choices.options import (
    check_options,
    convert,
    field_name,
    flag,
    option,
    option_name,
    whole_number,
)
from mulki.clip.evaluation import LabelSpace
from mulki.data import decoding, transform_names
from mulki.data.csv_files import CsvForm
from mulki.data.made_images import CHANGES, DEFAULT_CHANGES, check_changes
from mulki.data.published import PROTOCOLS
from mulki.data.transforms import TOGETHER
from mulki.errors import InputError, nearest
from mulki.files import MAX_MEMBER_MB, check_regular
from mulki.methods import Method
from mulki.train.config import precision, presets
from mulki.train.config.imports import import_modules
from mulki.train.config.rates import Schedule, learning_rates

AUTO = "auto"
# As --reference: the training images of the current task, or images made of them.
CURRENT = "current"
MADE = "made"


@dataclass(frozen=True)
class RunConfig:
    """Everything about a run but the method's own options."""

    tasks: tuple[str, ...] = option(
        ("embedded",),
        "a sequence, or task folders (class folders, tar shards, data sets of Hugging Face), CSV "
        "files and captions:PATH (images with captions) in their order",
    )
    continue_: str | None = option(
        None,
        "go on from a finished run or a checkpoint of one, with its options where none are given; "
        "its tasks stay learned, and are tested where their images are there",
    )
    test_tasks: tuple[str, ...] = option(
        (), "where the images of tasks that --continue has learned are; found if left out"
    )
    method: str = option("mulki", "what is trained", choices=methods.available)
    order: str = option(
        "I", "order of a named sequence: its name, or all its tasks with commas between"
    )
    data_root: str | None = option(
        None, "the folder that holds published data sets, as mtil has", alias="--data-location"
    )
    protocol: str | None = option(
        None,
        "splits and prompts of published data sets: zscl (torchvision's files), coop (CoOp's split "
        "files) or cil (class-incremental work); that of the sequence if left out",
        choices=PROTOCOLS,
    )
    test_fraction: float | None = option(
        None,
        "the share of each class to test on, of folders and files without a split of their own",
        above=0,
        below=1,
    )
    csv_img_key: str = option("path", "column of the paths in CSV files of tasks")
    csv_caption_key: str | None = option(
        None, "column of the labels, or of the captions; label or caption if left out"
    )
    csv_separator: str = option(",", "what separates the cells of CSV files, as open_clip's: tab")
    val_fraction: float | None = option(
        None,
        "the share of each class's training images that is held back, by whose accuracy the best "
        "step of each task is kept; folders may have val/ instead",
        above=0,
        below=1,
        of_classes=True,
    )
    val_every: int | None = option(
        None,
        "steps between two tests on the validation images; 0: none; a tenth of the task's steps if "
        "left out",
        low=0,
        of_classes=True,
    )
    early_stopping: int | None = option(
        None,
        "end a task after so many tests on its validation images without a better one",
        low=1,
        of_classes=True,
    )
    shots: int | None = option(
        None, "training images of each class, drawn with the seed; all if left out", low=1
    )
    scenario: Literal["tasks", "cil"] = option(
        "tasks", "cil: class-incremental, the classes of one task in steps (--increments)"
    )
    increments: int | None = option(None, "equal steps of the scenario cil", low=1)
    base_classes: int = option(0, "classes of a step before those, in the scenario cil", low=0)
    label_space: LabelSpace = option(
        "task",
        "classes among which a test image is classified: those of its task, of all tasks seen (its "
        "own before it is learned), or of all tasks, as in X-TAIL",
        of_classes=True,
    )
    seed: int = option(0, "seed of shuffling, augmentation and initialisation", low=0, below=2**32)
    preset: Literal["default", "small", "quick", "zscl", "mulki-mtil"] = option(
        "default",
        "small: half a batch, for comparisons of many runs; quick: a smoke test in under a minute; "
        "zscl, mulki-mtil: the training of ZSCL on MTIL, with its method or with mulki",
    )
    model: str = option(
        "mulki-mini",
        "mulki-mini, an open_clip model, a run folder or a checkpoint, hf-hub:..., local-dir:..., "
        "or hf-local:DIR, a CLIP or SigLIP that transformers has saved",
    )
    pretrained: str | None = option(
        None,
        "a tag of open_clip or a checkpoint's path; none: random weights",
        none_is_text=True,
    )
    original: str | None = option(
        None,
        "the original model as a teacher, as --model takes it, where --model has learned since; "
        "--model itself if left out",
    )
    original_pretrained: str | None = option(
        None, "a tag of open_clip or a checkpoint's path for --original"
    )
    teacher_cache: str | None = option(
        None,
        "a folder for features of the original model, which later runs with the same model, images "
        "and texts read in place of encoding them",
    )
    iterations: int = option(1000, "optimiser steps per task", low=1)
    epochs: float | None = option(
        None, "passes over a task's images, instead of iterations", above=0
    )
    batch_size: int = option(64, "images per step and process", low=1, alias="-b")
    sampling: Literal["uniform", "balanced"] = option(
        "uniform",
        "balanced: images of each class are drawn equally often, with repetition",
        of_classes=True,
    )
    micro_batch: str | None = option(
        None, "images encoded at a time, with the same gradients; auto: as many as fit"
    )
    batch_size_eval: int = option(256, "images per evaluation batch", low=1)
    precision_eval: precision.OfTests | None = option(
        None,
        "precision of tests and predictions, that of the stored weights if left out; amp and "
        "amp_bf16 are faster on GPUs, and on CPUs that multiply bfloat16",
    )
    lr: float = option(1e-5, "base learning rate", above=0)
    lr_of: tuple[str, ...] = option((), "base learning rates of single tasks, as NAME=RATE")
    lr_first_layer: float = option(
        1.0,
        "learning rate of the first layers of each tower as a share of that of the last ones, to "
        "which it grows linearly",
        low=0,
        high=1,
    )
    layer_decay: float = option(
        1.0,
        "learning rate of each layer as a share of that of the next one, in each tower, (0, 1]",
        above=0,
        high=1,
    )
    lr_text_tower: float = option(
        1.0, "learning rate of the text tower as a share of that of the image tower", low=0
    )
    lora_rank: int | None = option(
        None,
        "train low-rank adapters (LoRA) of this rank in place of the weights, which teachers then "
        "share; merged in each checkpoint",
        low=1,
    )
    lora_targets: tuple[str, ...] = option(
        (),
        "modules with adapters, by the ends of their names, as attn mlp; all linear layers, 1 x 1 "
        "convolutions and attention that train if left out",
    )
    lora_alpha: float | None = option(
        None, "scale of the adapters times their rank; the rank if left out", above=0
    )
    opt: Literal["adamw", "muon"] = option(
        "adamw",
        "optimiser; muon: for matrices, with AdamW for embeddings and all that is not a matrix",
    )
    wd: float = option(0.0, "weight decay", low=0, alias="--weight-decay")
    beta1: float = option(0.9, "AdamW's beta1", low=0, below=1)
    beta2: float = option(0.999, "AdamW's beta2", low=0, below=1)
    eps: float = option(1e-8, "AdamW's epsilon", above=0)
    warmup: int | None = option(
        None, "steps of linear warm-up per task; a tenth of its steps if left out", low=0
    )
    lr_scheduler: Schedule = option("cosine", "learning rate after warm-up")
    grad_clip_norm: float | None = option(None, "largest gradient norm", above=0)
    spike_guard: float | None = option(
        None, "leave out a step whose loss is more than so many times its running mean", above=1
    )
    precision: precision.Name = option("auto", "auto: amp_bf16 where it is faster, else fp32")
    deterministic: bool = option(
        False, "only algorithms that give the same bits every time, as the CPU's do anyway"
    )
    grad_checkpointing: bool = option(False, "recompute activations instead of keeping them")
    torchcompile: bool = option(False, "compile the encoders with torch.compile")
    fsdp: bool = option(False, "shard the models over the processes of torchrun (FSDP2)")
    lock_text: bool = option(False, "freeze the text transformer")
    lock_image: bool = option(False, "freeze the image tower")
    reference: str | None = option(
        MADE,
        "images and captions to distil on: a folder, a CSV, tar shards, made (images made of the "
        "task's own by --reference-changes) or current (these images themselves); captions of the "
        "last two are words of the vocabulary",
        of_classes=True,
    )
    reference_changes: tuple[str, ...] = option(
        DEFAULT_CHANGES,
        f"what --reference made does to images, one change to each: some of {', '.join(CHANGES)}",
        of_classes=True,
    )
    reference_batch_size: int | None = option(
        None,
        "reference images per step and process; --batch-size if left out",
        low=1,
        of_classes=True,
    )
    vocabulary: str | None = option(
        None,
        "a text file of words, one a line, as text anchors or as captions of --reference made "
        "or current; ImageNet's names if left out",
        of_classes=True,
    )
    anchors_per_step: int | None = option(
        None,
        "text anchors drawn for each step; if left out all, or where the student encodes them at "
        "most 32768, 256 if its text tower trains",
        low=1,
        of_classes=True,
    )
    head: bool = option(
        True,
        "keep class statistics of each task, and test with the head that they make beside the "
        "texts alone; nothing is trained for it",
        of_classes=True,
    )
    head_weight: float = option(
        0.1, "weight of the class statistics in that head", low=0, of_classes=True
    )
    head_shrinkage: float = option(
        0.03,
        "shrinkage of its covariance towards a multiple of the identity, (0, 1]",
        above=0,
        high=1,
        of_classes=True,
    )
    head_drift: str | None = option(
        None,
        "sdc: the kept class means move along with the features of a sample of each later task",
        choices=("sdc",),
        of_classes=True,
    )
    augment: str = option(
        "none",
        "how training images are changed, several with + between, as crop+flip; none: not at all, "
        "and teachers are encoded once for each image",
        choices=transform_names,
        separator=TOGETHER,
    )
    limit_images: int | None = option(
        None, "use at most so many images of each split, one of each class at least", low=1
    )
    skip_bad_images: bool = option(False, "leave unreadable images out")
    max_pixels: int = option(decoding.MAX_PIXELS, "largest width times height of an image", low=1)
    max_member_mb: int = option(
        MAX_MEMBER_MB, "most MB to which a compressed file, or a member of one, unpacks", low=1
    )
    workers: int = option(0, "data loading processes", low=0, alias="-j")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps, ...")
    process_timeout: float = option(
        600.0, "seconds that the processes of torchrun wait for one that says nothing", above=0
    )
    logs: str = option("logs", "folder of run folders", alias="--output")
    name: str | None = option(None, "name of the run folder; made from the date if left out")
    log_every_n_steps: int | None = option(
        None,
        "steps between two lines of losses in out.log and points of its curves; if left out, 10, "
        "or fewer in a short task, so that it has 20 points",
        low=1,
    )
    report_to: tuple[str, ...] = option(
        ("auto",),
        "where curves go: tensorboard, wandb (offline unless WANDB_MODE says otherwise), all, "
        "none; auto: tensorboard where it is installed",
    )
    save_every: int | None = option(
        None,
        "steps between two saves for --resume; 0: only at the end of a task; if left out, as often "
        "as they cost at most 2 % of the time",
        low=0,
    )
    save_checkpoints: bool = option(True, "keep the weights after each task")
    import_: tuple[str, ...] = option(
        (),
        "a Python file or module with methods, sequences, transforms or gates of your own; may be "
        "given several times",
        repeat="MODULE",
    )


@dataclass(frozen=True)
class Settings:
    """A resolved configuration.

    Args:
        run: options of the run.
        method: options of its method.
    """

    run: RunConfig
    method: Method.Options

    def to_dict(self) -> dict[str, Any]:
        """One flat dict, as `--config` reads it."""
        given = asdict(self.run) | asdict(self.method)
        if self.run.epochs is not None:
            del given["iterations"]  # it has no effect, and `resolve` refuses it beside epochs
        return {
            option_name(name): list(value) if isinstance(value, tuple) else value
            for name, value in given.items()
        }


def resolve(given: Mapping[str, Any]) -> Settings:
    """Combine what was given (config file and command line) with presets and defaults.

    The modules of the option ``import`` are imported first.

    Args:
        given: values by option name with underscores, of the run and of its method; strings are
            converted to an option's type.

    Raises:
        InputError: an unknown method or option, a value of the wrong type or out of bounds, a
            module that cannot be imported, or iterations together with epochs.
    """
    given = {field_name(key): value for key, value in given.items()}
    if modules := import_given(given):
        given["import_"] = modules
    method = methods.get(str(given.get("method") or presets.method_of(given.get("preset"))))
    of_run, of_method = field_names(RunConfig), field_names(method.Options)
    for key in given:
        if key not in of_run and key not in of_method:
            raise unknown_option(key, method.name)
    run = convert(RunConfig, {k: v for k, v in given.items() if k in of_run})
    method_options = convert(method.Options, {k: v for k, v in given.items() if k in of_method})
    if run.get("iterations") is not None and run.get("epochs") is not None:
        raise InputError("--iterations and --epochs: got both, wanted one of the two")
    preset = run.get("preset", RunConfig.preset)
    merged = presets.lookup(run.get("model"), method.name, preset) | run | method_options
    merged["method"] = method.name
    config = RunConfig(**{k: v for k, v in merged.items() if k in of_run})
    options = method.Options(**{k: v for k, v in merged.items() if k in of_method})
    check_options(config)
    check_options(options)
    learning_rates(config.lr_of)
    check_changes(config.reference_changes)
    csv_form(config)
    _check_micro_batch(config)
    _check_scenario(config)
    return Settings(config, options)


def csv_form(config: RunConfig) -> CsvForm:
    """How the CSV files of a run are written.

    Raises:
        InputError: a separator that is no single character.
    """
    given = config.csv_separator
    separator = "\t" if given in ("tab", "\\t") else given
    if len(separator) != 1 or separator in '"\r\n':
        raise InputError(f"--csv-separator: got {given!r}, wanted one character, or tab")
    return CsvForm(config.csv_img_key, config.csv_caption_key, separator)


def import_given(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Import the modules of the field `import_`, as `import_modules` does."""
    named = {"import_": given.get("import_", ())}
    return import_modules(convert(RunConfig, named)["import_"])


def _check_micro_batch(config: RunConfig) -> None:
    given = config.micro_batch
    if given == AUTO and config.deterministic:
        raise InputError(
            f"--micro-batch {AUTO}: depends on the memory that is free, and so do the last bits; "
            "pass a number beside --deterministic"
        )
    if given is None or given == AUTO:
        return
    size = whole_number(given)
    if size is None or size < 1:
        raise InputError(f"--micro-batch: got {given!r}, wanted a whole number from 1, or {AUTO}")
    if size > config.batch_size:
        raise InputError(
            f"--micro-batch: got {given}, wanted at most --batch-size, {config.batch_size}"
        )


def _check_scenario(config: RunConfig) -> None:
    if config.scenario == "cil" and config.increments is None:
        raise InputError(
            "--scenario cil: got no --increments, the number of equal steps; pass one, such as 10"
        )
    if config.scenario != "cil":
        for name in ("increments", "base_classes"):
            if value := getattr(config, name):
                raise InputError(
                    f"{flag(name)}: got {value}, which belongs to the scenario cil; pass "
                    "--scenario cil, or leave it out"
                )


def field_names(options: type) -> frozenset[str]:
    """Names of the fields of an options dataclass."""
    return frozenset(f.name for f in fields(options))


def options_for(
    given: Mapping[str, Any], chosen: Sequence[str], others: Sequence[str]
) -> dict[str, Any]:
    """Options without those of other methods.

    Args:
        given: options by name.
        chosen: methods of which one at least is to have an option.
        others: methods whose options are left out, unless the run or a chosen one has them. What
            none of them has stays, and is an error later.
    """
    own = field_names(RunConfig).union(*(field_names(methods.get(n).Options) for n in chosen))
    foreign = frozenset().union(*(field_names(methods.get(n).Options) for n in others)) - own
    return {name: value for name, value in given.items() if field_name(name) not in foreign}


def unknown_option(name: str, method: str) -> InputError:
    """The error for an option that neither the run nor the method has.

    It names the methods that have the option, or else the option with the most similar name.
    """
    owners = [n for n, m in methods.available().items() if name in field_names(m.Options)]
    if owners:
        return InputError(
            f"{flag(name)}: method {method} has no such option, it belongs to "
            f"{', '.join(owners)}; leave it out or change --method"
        )
    known = field_names(RunConfig) | field_names(methods.get(method).Options)
    # "blur" is not a misspelt "lr": a slip does not make a name twice as long.
    likely = [word for k in known if 2 * len(word := flag(k)[2:]) > len(flag(name)[2:])]
    close = nearest(flag(name)[2:], likely)
    return InputError(f"{flag(name)}: no such option{close}; mulki run --help-all lists them")


def read_config(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file, by the name of their field.

    Raises:
        InputError: no such file, not YAML, or not a mapping of option names.
    """
    try:
        check_regular(path)
        given = options_in(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"--config: {path} cannot be read ({error}); pass a YAML file") from None
    return {field_name(key): value for key, value in given.items()}
