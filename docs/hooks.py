"""Hooks of MkDocs: which files are the site, formulas as MathML, and nothing from a network.

A page has the path that its file has in the repository, so a link works in both places. Beside
README.md and docs/, whatever these link to is taken along: Markdown as a page, any other file as it
is.
"""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s#]+)")
# What a browser loads by itself. A link to click on is none of it.
LOADED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\bsrc="((?:https?:)?//[^"]+)|<link\b[^>]*'
)
# A name or an option, short enough for a line of a phone.
SHORT = re.compile(r"<code>([^<\s]{2,28})</code>")
HREF = re.compile(r'\bhref="((?:https?:)?//[^"]+)')
# As pymdownx.arithmatex leaves them, for a script in the browser.
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def published() -> list[Path]:
    """The files of the site."""
    pending = [ROOT / "README.md"]
    for pattern in ("*.md", "*.ipynb", "*.svg", "*.css"):
        pending += sorted((ROOT / "docs").rglob(pattern))
    found: list[Path] = []
    while pending:
        path = pending.pop(0)
        if path in found:
            continue
        found.append(path)
        if path.suffix == ".md":
            links = LINK.findall(path.read_text(encoding="utf-8"))
            linked = [(path.parent / link).resolve() for link in links if "://" not in link]
            # What is missing is for MkDocs to say.
            pending += [file for file in linked if file.is_file() and file.is_relative_to(ROOT)]
    return found


def notebook_page(path: Path) -> str:
    """The cells of a notebook as Markdown."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    parts = []
    for cell in cells:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join([*parts, f"[This page as a notebook]({path.name})"])


def from_elsewhere(html: str) -> list[str]:
    """What a browser would fetch from another host to show this page."""
    found = [match[1] or "".join(HREF.findall(match[0])) for match in LOADED.finditer(html)]
    return [address for address in found if address]


def unbroken(html: str) -> str:
    """With a class on names and options that no line should break, as after their hyphens."""
    return SHORT.sub(r'<code class="whole">\1</code>', html)


def typeset(html: str) -> str:
    """With formulas as MathML, which a browser shows without a script."""

    def mathml(formula: re.Match[str]) -> str:
        shown = convert(unescape(formula[2]), display="block" if formula[1] == "div" else "inline")
        # A command that the converter does not know comes out as it stands.
        if "\\" in shown or "<mi>&</mi>" in shown:
            raise PluginError(f"no MathML for {formula[2].strip()}")
        return shown

    return FORMULA.sub(mathml, html)


def on_page_content(html: str, page: object, config: MkDocsConfig, files: Files) -> str:
    return unbroken(typeset(html))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    for path in published():
        name = path.relative_to(ROOT).as_posix()
        files.append(File.generated(config, name, abs_src_path=str(path)))
        if path.suffix == ".ipynb":
            page = str(Path(name).with_suffix(".md"))
            files.append(File.generated(config, page, content=notebook_page(path)))
    return files


def on_post_page(output: str, page: object, config: MkDocsConfig) -> str:
    if found := from_elsewhere(output):
        raise PluginError(f"{page}: loads {', '.join(found)}; a page has to work offline")
    return output
