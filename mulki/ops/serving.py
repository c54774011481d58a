"""Who serves the operators, gathered for people to read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mulki.ops import proofs
from mulki.ops.backends import Served


class Group(NamedTuple):
    """Operators that one backend serves, better ones being rejected for the same reasons."""

    device_type: str
    dtypes: tuple[str, ...]  # such as "float32"
    sizes: tuple[str, ...]  # of calls; empty for all
    backend: str
    rejected: tuple[tuple[str, str], ...]  # better backends, and why they do not serve
    ops: tuple[str, ...]

    @property
    def where(self) -> str:
        """Device, dtypes and sizes in words."""
        words = [self.device_type, " and ".join(self.dtypes)]
        return ", ".join(words + ([f"{' and '.join(self.sizes)} sizes"] if self.sizes else []))

    @property
    def reasons(self) -> str:
        """The better backends and why they do not serve, in words; empty where there are none."""
        return "; ".join(f"{name}: {why}" for name, why in self.rejected)


def grouped(served: Iterable[Served]) -> list[Group]:
    """The groups, in the order of their first members."""
    sizes: dict[tuple[str, str, str, str, tuple[tuple[str, str], ...]], list[str]] = {}
    for one in served:
        dtype = str(one.dtype).removeprefix("torch.")
        key = one.device_type, one.op, dtype, one.backend, tuple(one.rejected.items())
        sizes.setdefault(key, []).extend([one.size] if one.size else proofs.SIZES)
    dtypes: dict[tuple[str, str, tuple[str, ...], str, tuple[tuple[str, str], ...]], list[str]] = {}
    for (device, op, dtype, backend, rejected), found in sizes.items():
        some = () if set(found) == set(proofs.SIZES) else tuple(found)
        dtypes.setdefault((device, op, some, backend, rejected), []).append(dtype)
    ops: dict[Group, list[str]] = {}
    for (device, op, some, backend, rejected), names in dtypes.items():
        group = Group(device, tuple(names), some, backend, rejected, ())
        ops.setdefault(group, []).append(op)
    return [group._replace(ops=tuple(names)) for group, names in ops.items()]
