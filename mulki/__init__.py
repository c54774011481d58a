"""mulki: teach a CLIP-like model new tasks without forgetting.

MulKI (arXiv 2411.06764), reimplemented from its published description. Losses are functions in
`mulki.functional` and modules in `mulki.losses`; both work on `Similarity`.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from mulki import functional, losses
from mulki.similarity import Similarity

if TYPE_CHECKING:
    from mulki.info import info

__version__ = "0.1.0"

__all__ = ["Similarity", "functional", "info", "losses"]


def __getattr__(name: str) -> ModuleType:
    # Imported when asked for: `python -m mulki.info` wants to be the first to run that module.
    if name == "info":
        return importlib.import_module("mulki.info")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _import_kernels() -> None:
    """Import `mulki.kernels` from the folder beside this one, where it is in a checkout.

    An installed package has it inside. The import system finds the folder in some editable
    installs, in others and in a bare checkout it does not, or finds that of another checkout.
    """
    here = Path(__file__).resolve().parent
    init = here.parent / "kernels" / "__init__.py"
    if (here / "kernels").is_dir() or not init.is_file():
        return
    spec = importlib.util.spec_from_file_location(f"{__name__}.kernels", init)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = globals()["kernels"] = module
    spec.loader.exec_module(module)


_import_kernels()
