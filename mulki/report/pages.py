"""Pages of one file, from the templates in ``page/``: one style, one script, no network."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup, escape


def render(template: str, **values: Any) -> str:
    """Fill a template that extends ``base.html``; text is escaped.

    Args:
        template: its text.
        values: of its variables; ``title`` is one of them.
    """
    return _compiled(template).render(
        style=Markup(page_file("style.css")), script=Markup(page_file("script.js")), **values
    )


@cache
def _compiled(template: str) -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, loader=FunctionLoader(page_file)
    )
    environment.filters["breakable"] = _breakable
    return environment.from_string(template)


def _breakable(text: str) -> Markup:
    # Where a line may end within a long word, such as an option's name and value.
    return Markup(re.sub(r"([_=/,])", r"\1<wbr>", str(escape(text))))


def page_file(name: str) -> str:
    """The text of a file in ``page/``."""
    return (resources.files("mulki.report") / "page" / name).read_text(encoding="utf-8")
