"""rich's console, on which names from elsewhere cannot write control characters."""

from __future__ import annotations

from collections.abc import Iterable

from rich import console
from rich.segment import Segment

from mulki.printing import printable


class Console(console.Console):
    """As rich's, but for control characters of a text, which are escaped; see `printable`."""

    def render(
        self, renderable: console.RenderableType, options: console.ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """The segments of something to print; what moves the cursor is in segments of its own."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(printable(segment.text, keep="\n"), segment.style)
