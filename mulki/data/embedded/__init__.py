"""The bundled pack of real images, six tasks in four orders; sources in LICENSES beside it."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from mulki.data.shards import open_pack
from mulki.data.task import Task
from mulki.errors import InputError


def embedded_root() -> Path:
    """Folder of the bundled pack."""
    return Path(str(files(__name__)))


def embedded_sequence(order: str = "I", root: Path | None = None) -> list[Task]:
    """The bundled tasks, in one of their orders.

    Args:
        order: "I", "II", "III" or "IV".
        root: another pack of the same format.

    Raises:
        InputError: unknown order; missing or damaged pack.
    """
    pack = open_pack(root or embedded_root())
    if order not in pack.orders:
        raise InputError(f'order "{order}": embedded has the orders {", ".join(pack.orders)}')
    return [pack.task(name) for name in pack.orders[order]]
