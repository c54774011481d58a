"""mulki: teach a CLIP-like model new tasks without forgetting.

MulKI (arXiv 2411.06764), reimplemented from its published description. Losses are functions in
`mulki.functional` and modules in `mulki.losses`; both work on `Similarity`.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mulki.distributed import wait_policy

# The kernels lie inside an installed package, and beside this folder in a checkout.
if not (Path(__file__).parent / "kernels" / "__init__.py").is_file():
    __path__.append(str(Path(__file__).resolve().parents[1]))

# Before torch is imported.
wait_policy.set_for_run()

from mulki import functional, losses  # noqa: E402
from mulki.similarity import Similarity  # noqa: E402

if TYPE_CHECKING:
    from mulki.info import info

__version__ = "0.1.0"

__all__ = ["Similarity", "functional", "info", "losses"]


def __getattr__(name: str) -> ModuleType:
    # Imported when asked for: `python -m mulki.info` wants to be the first to run that module.
    if name == "info":
        return importlib.import_module("mulki.info")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
