from __future__ import annotations

from mulki.representation import arguments_shown


class Made:
    def __init__(self, scale: float = 1.0, name: str = "a", *, kept: int = 2):
        self.scale, self.name, self.hidden = scale, name, kept


def test_what_is_not_the_default_is_shown() -> None:
    assert arguments_shown(Made()) == ""
    assert arguments_shown(Made(2.0, "b")) == "scale=2.0, name='b'"
    # Of an argument that is no attribute the value is given.
    assert arguments_shown(Made(), kept=3) == "kept=3"
