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
    add_options(parser, RunConfig, only="model", defaults=False)
    given = parser.parse_args(with_hyphens(argv))
    if given.to not in FORMATS:
        raise InputError(
            f"--to: got {given.to!r}{nearest(given.to, FORMATS)}, wanted {' or '.join(FORMATS)}"
        )
    from mulki.clip.exporting.huggingface import export_huggingface
    from mulki.clip.exporting.onnx import export_onnx
    from mulki.train.saving.checkpoints import load_checkpoint

    model = load_checkpoint(Path(given.checkpoint), given.model)
    write = export_huggingface if given.to == "huggingface" else export_onnx
    difference = write(model, Path(given.folder))
    print(f"{given.folder}: written; its features differ by at most {difference:.1e}")
    return 0
