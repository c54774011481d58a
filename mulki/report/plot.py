"""A figure for a page and for files.

It is drawn with two colours of text and lines that the page replaces by its own, so that a figure
follows the light or dark appearance of the page around it.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mulki.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Of Okabe and Ito, which differ for any colour vision, without black and yellow: legible on a light
# and on a dark page.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8c6bb1", "#7f7f7f")
# Stand for the colours of text, and of what is less important, until they are replaced.
TEXT, DIM = "#010203", "#010204"
_SIZE, _LEGEND_ROW = (5.2, 3.2), 0.22
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": DIM,
    "axes.labelcolor": TEXT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "font.size": 10,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.labelcolor": TEXT,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.color": TEXT,
    # A dollar sign in the name of a task is no formula.
    "text.parse_math": False,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}


_DASHES = ("-", "--", ":")
# Characters that one, two and three columns of a legend have room for.
_ROOM = (62, 26, 15)


def look(number: int) -> tuple[str, str]:
    """Colour and dashes of a curve: colours first, then the same ones with other dashes."""
    return COLOURS[number % len(COLOURS)], _DASHES[number // len(COLOURS) % len(_DASHES)]


def entry(name: str, room: int = _ROOM[0]) -> str:
    """A name as a legend shows it; a long one loses its middle, since its end may tell it apart."""
    half = room // 2
    if len(name) > room:
        name = f"{name[: half - 1]}\N{HORIZONTAL ELLIPSIS}{name[-half:]}"
    # Matplotlib leaves names that begin with an underscore out of legends.
    return f" {name}" if name.startswith("_") else name


def plain_log(axes: Axes) -> None:
    """Label a logarithmic y axis with plain numbers, and not with powers of ten.

    Call it when all is drawn: a short axis has other ticks than a long one.
    """
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    low, high = axes.get_ylim()
    narrow = high < 5 * low
    subs = (1.0, 2.0, 5.0) if high < 1000 * low else (1.0,)
    axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=subs))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _columns(longest: int) -> int:
    return max((n for n, room in enumerate(_ROOM, 1) if longest <= room), default=1)


@dataclass(frozen=True)
class Plot:
    """A figure.

    Args:
        name: of its files.
        title: a few words.
        text: what it shows, for those who do not see it too.
        draw: draws it, and returns how many entries its legend has.
    """

    name: str
    title: str
    text: str
    draw: Callable[[Axes], int]

    def svg(self) -> str:
        """An ``<svg>`` element whose text has the colour of the text around it."""
        text = self._saved("svg").decode("utf-8")
        text = text[text.index("<svg") :]
        opened, rest = text.split(">", 1)
        box = re.search(r'viewBox="[^"]*"', opened)
        rest = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", rest, flags=re.DOTALL)
        rest = rest.replace(TEXT, "currentColor").replace(DIM, "var(--dim, currentColor)")
        # Several figures are on one page, so their names have to differ.
        rest = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{self.name}-", rest)
        return f'<svg {box[0] if box else ""} aria-hidden="true" focusable="false">{rest.strip()}'

    def write(self, folder: Path) -> list[Path]:
        """Write ``NAME.png`` and ``NAME.svg``, and return their paths."""
        paths = []
        for kind in ("png", "svg"):
            content = self._saved(kind)
            if kind == "svg":
                text = content.decode("utf-8").replace(TEXT, "#222222").replace(DIM, "#777777")
                content = text.encode("utf-8")
            with replacing(folder / f"{self.name}.{kind}") as temporary:
                temporary.write_bytes(content)
            paths.append(folder / f"{self.name}.{kind}")
        return paths

    def _saved(self, kind: str) -> bytes:
        import matplotlib as mpl
        from matplotlib.figure import Figure

        stream = io.BytesIO()
        with mpl.rc_context(_STYLE | {"svg.hashsalt": self.name}), warnings.catch_warnings():
            # Of letters that its font lacks; a browser has others.
            warnings.simplefilter("ignore")
            figure = Figure(figsize=_SIZE, layout="constrained")
            axes = figure.add_subplot()
            axes.grid(axis="y", color=DIM, alpha=0.25, linewidth=0.6)
            axes.set_axisbelow(True)
            entries = self.draw(axes)
            if entries:
                _, labels = axes.get_legend_handles_labels()
                columns = _columns(max(map(len, labels)))
                figure.set_figheight(_SIZE[1] + _LEGEND_ROW * math.ceil(entries / columns))
                figure.legend(loc="outside lower center", ncols=columns)
            empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
            figure.savefig(
                stream,
                format=kind,
                dpi=200,
                transparent=kind == "svg",
                metadata=empty if kind == "svg" else None,
            )
        return stream.getvalue()
