from __future__ import annotations

from dataclasses import replace

from mulki import methods
from mulki.train.config.run_config import RunConfig, Settings
from mulki.train.start.hashes import same_in_all


def test_an_import_may_lie_elsewhere_on_another_machine() -> None:
    hashes = {"tasks": {}, "weights": ""}
    settings = [
        Settings(replace(RunConfig(), import_=(place,)), methods.get("lwf").Options())
        for place in ("/a/mine.py", "/b/mine.py")
    ]
    one, other = (same_in_all(each, [], hashes) for each in settings)
    assert one == other
