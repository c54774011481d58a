"""mulki: teach a CLIP-like model new tasks without forgetting.

MulKI (arXiv 2411.06764), reimplemented from its published description. Losses are functions in
`mulki.functional` and modules in `mulki.losses`; both work on `Similarity`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mulki.distributed import wait_policy

# The kernels lie inside an installed package, and beside this folder in a checkout. An __init__.py
# in their folder would there hide the package `kernels` that transformers imports.
if not (Path(__file__).parent / "kernels" / "lookup.py").is_file():
    __path__.append(str(Path(__file__).resolve().parents[1]))

# Before torch is imported.
wait_policy.set_for_run()

if TYPE_CHECKING:
    from mulki import functional, losses
    from mulki.info import info
    from mulki.similarity import Similarity
    from mulki.train.model import Model, Run, load, run

__version__ = "0.1.0"

__all__ = ["Model", "Run", "Similarity", "functional", "info", "load", "losses", "run"]


_PLACES = {
    **dict.fromkeys(("Model", "Run", "load", "run"), "mulki.train.model"),
    "Similarity": "mulki.similarity",
}


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line answers --help without torch, training needs
    # packages that losses do without, and `python -m mulki.info` wants to be the first to run that
    # module.
    if name in ("functional", "info", "losses"):
        return importlib.import_module(f"mulki.{name}")
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
