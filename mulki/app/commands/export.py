"""``mulki export``: a checkpoint in the format of transformers, or as ONNX towers."""

from __future__ import annotations

from pathlib import Path

from mulki.app.commands.parsing import Parser, add_options, with_hyphens
from mulki.errors import InputError, nearest

FORMATS = ("huggingface", "onnx")


def export(argv: list[str]) -> int:
    """Run the command with these arguments; return its exit status.

    Raises:
        InputError: bad arguments or checkpoint, a missing package, or a model that the format has
            not.
    """
    from mulki.train.config.run_config import RunConfig

    parser = Parser(
        prog="mulki export",
        description="Write a checkpoint in another format, and check it against the original",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="as mulki eval takes it")
    parser.add_argument("folder", metavar="DIR", help="where it goes; it must be new or empty")
    parser.add_argument("--to", metavar="{" + ",".join(FORMATS) + "}", required=True)
    parser.add_argument(
        "--classes",
        action="store_true",
        help="of ONNX: also classifier.onnx, from pixels to logits of the classes that the model "
        "has learned, with its class statistics",
    )
    add_options(parser, RunConfig, only="model", defaults=False)
    given = parser.parse_args(with_hyphens(argv))
    if given.to not in FORMATS:
        raise InputError(
            f"--to: got {given.to!r}{nearest(given.to, FORMATS)}, wanted {' or '.join(FORMATS)}"
        )
    from mulki.clip.exporting.huggingface import export_huggingface
    from mulki.clip.exporting.onnx import export_onnx
    from mulki.clip.head import read_statistics
    from mulki.train.model import Model
    from mulki.train.saving.checkpoints import description_of, load_checkpoint, statistics_of

    if given.classes and given.to != "onnx":
        raise InputError(f"--classes: belongs to --to onnx, not to {given.to}; leave it out")
    model, folder = load_checkpoint(Path(given.checkpoint), given.model), Path(given.folder)
    if given.to == "huggingface":
        difference = export_huggingface(model, folder)
    else:
        classes = None
        if given.classes:
            path = Path(given.checkpoint)
            statistics = read_statistics(file) if (file := statistics_of(path)).is_file() else None
            said = description_of(path)
            if said is None or not any(task.classes for task in said.tasks):
                raise InputError(f"--classes: {path} says no classes; leave it out")
            model.eval()
            classes = Model(model, said, given.checkpoint, statistics=statistics).layer()
        difference = export_onnx(model, folder, classes)
    print(f"{given.folder}: written; its features differ by at most {difference:.1e}")
    return 0
