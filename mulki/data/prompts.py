"""Prompt templates: text with one `{}` for the class name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mulki.errors import InputError
from mulki.files import check_regular

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def check_templates(templates: Sequence[str], where: str) -> tuple[str, ...]:
    """Return `templates` as a tuple, after checking that each holds exactly one `{}`.

    Raises:
        InputError: none given, or one without a single `{}`; the message begins with `where`.
    """
    if isinstance(templates, str):
        templates = [templates]
    if not templates:
        raise InputError(f'{where}: no template; give at least one, such as "a photo of a {{}}."')
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(
                f'{where}: template "{template}" must hold exactly one {{}}, '
                "the place of the class name"
            )
    return tuple(templates)


def read_templates(path: Path) -> tuple[str, ...]:
    """Read templates from a text file: one a line, blank lines and lines that begin with # skipped.

    Raises:
        InputError: not UTF-8 text, no template, or a line without exactly one `{}` (numbered).
    """
    check_regular(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({error}); save it so") from error
    templates: list[str] = []
    for number, line in enumerate(lines, start=1):
        line = line.strip()
        if line and not line.startswith("#"):
            templates += check_templates([line], f"{path} line {number}")
    return check_templates(templates, str(path))


def fill(template: str, class_name: str) -> str:
    """Put a class name into a template."""
    # Not str.format: other braces in a template or a name are plain text.
    return template.replace("{}", class_name)


def filled(
    classes: Sequence[str], templates: Sequence[str], texts: Sequence[Sequence[str]]
) -> list[list[str]]:
    """The prompts of each class, [C][...]: every template with its name, then texts of its own.

    Args:
        texts: of each class, [C]; empty where none has any.
    """
    each = texts or [()] * len(classes)
    return [
        [*(fill(template, name) for template in templates), *own]
        for name, own in zip(classes, each, strict=True)
    ]
