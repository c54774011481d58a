"""mulki: teach a CLIP-like model new tasks without forgetting.

MulKI (arXiv 2411.06764), reimplemented from its published description. Losses are functions in
`mulki.functional` and modules in `mulki.losses`; both work on `Similarity`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

from mulki.distributed import wait_policy

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


class _CheckoutFinder:
    """Finds the packages that a checkout keeps in folders beside this one.

    An installed package has them inside. It goes before all other finders: that of an editable
    install may know none of these folders, or those of another checkout.
    """

    _HERE = Path(__file__).resolve().parent
    _FOLDERS: ClassVar = {
        f"{__name__}.kernels": _HERE.parent / "kernels",
        f"{__name__}.bench": _HERE.parent / "benchmarks" / "ops",
    }

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in cls._FOLDERS:
            return None
        inside = cls._HERE / name.rpartition(".")[2] / "__init__.py"
        beside = cls._FOLDERS[name] / "__init__.py"
        if inside.is_file() or not beside.is_file():
            return None
        return importlib.util.spec_from_file_location(name, beside)


sys.meta_path.insert(0, _CheckoutFinder)
