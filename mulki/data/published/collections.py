"""Sequences of published data sets: MTIL, X-TAIL, and single sets for class-incremental runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mulki.data.published.source import Source
from mulki.data.published.tasks import NotThere, published_task
from mulki.data.task import Task
from mulki.errors import InputError, nearest


@dataclass(frozen=True)
class Collection:
    """Published data sets under one name.

    Attributes:
        name: as users write it.
        members: names of its data sets.
        protocols: those that it can be read with, its own first.
        orders: data sets by the name of the order; empty for sets that are run one by one.
        templates: used instead of those of the protocol.
    """

    name: str
    members: tuple[str, ...]
    protocols: tuple[str, ...]
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    templates: tuple[str, ...] | None = None

    def source(self, source: Source) -> Source:
        """The source with the protocol of this sequence where the user named none.

        Raises:
            InputError: a protocol that it has not.
        """
        protocol = source.protocol or self.protocols[0]
        if protocol not in self.protocols:
            raise InputError(
                f"--protocol {protocol}: {self.name} has no such splits"
                f"{nearest(protocol, self.protocols)}; it has {', '.join(self.protocols)}"
            )
        return replace(source, protocol=protocol)

    def in_order(self, order: str) -> tuple[str, ...]:
        """Names of its data sets in a named order, or in that of names with commas between.

        Raises:
            InputError: an unknown order, or names that are not all of its data sets once.
        """
        if not self.orders:
            raise InputError(
                f"{self.name}: its data sets are run one by one; name one of "
                f"{', '.join(f'{self.name}:{each}' for each in self.members)}"
            )
        if order in self.orders:
            return self.orders[order]
        return permuted(self.members, order, self.name, tuple(self.orders))

    def tasks(self, order: str, source: Source) -> list[Task]:
        """All its tasks.

        Raises:
            InputError: an unknown order or protocol, or data sets that cannot be read; one message
                names all of them.
        """
        source = self.source(source)
        tasks: list[Task] = []
        missing: dict[str, NotThere] = {}
        for name in self.in_order(order):
            try:
                tasks.append(published_task(name, source, self.templates))
            except NotThere as error:
                missing[name] = error
        if len(missing) > 1:
            raise NotThere(
                f"{self.name}: {len(missing)} data sets cannot be read ({', '.join(missing)}); "
                f"mulki tasks {self.name} --prepare --data-root {source.root} downloads what it "
                "can and says what to do about the rest"
            )
        if missing:
            raise next(iter(missing.values()))
        return tasks

    def task(self, name: str, source: Source) -> Task:
        """One of its tasks.

        Raises:
            InputError: no such data set, or see `published_task`.
        """
        self.check_member(name)
        return published_task(name, self.source(source), self.templates)

    def check_member(self, name: str) -> None:
        """Raise an InputError that lists its data sets if `name` is none of them."""
        if name not in self.members:
            raise InputError(
                f"{self.name}:{name}: {self.name} has no such task{nearest(name, self.members)}; "
                f"it has {', '.join(self.members)}"
            )


def permuted(
    members: tuple[str, ...], order: str, sequence: str, orders: tuple[str, ...]
) -> tuple[str, ...]:
    """The names in an order given as `name,name,...`.

    Args:
        members: all names.
        order: what the user gave.
        sequence, orders: the sequence and its named orders, for the message.

    Raises:
        InputError: anything but each name once.
    """
    names = tuple(name.strip() for name in order.split(","))
    if "," in order and sorted(names) == sorted(members):
        return names
    problem = f"{sequence} has the orders {', '.join(orders)}"
    if "," in order:
        problem = "a name occurs twice"
        if odd := next((name for name in names if name not in members), None):
            problem = f"{sequence} has no task {odd}{nearest(odd, members)}"
        elif absent := next((name for name in members if name not in names), None):
            problem = f"{absent} is missing"
    raise InputError(
        f'order "{order}": {problem}; another order is all its tasks with commas between, such as '
        f"{','.join(reversed(members))}"
    )


_I = (
    "aircraft",
    "caltech101",
    "cifar100",
    "dtd",
    "eurosat",
    "flowers",
    "food",
    "mnist",
    "oxfordpet",
    "stanfordcars",
    "sun397",
)
_II = (
    "stanfordcars",
    "food",
    "mnist",
    "oxfordpet",
    "flowers",
    "sun397",
    "aircraft",
    "caltech101",
    "dtd",
    "eurosat",
    "cifar100",
)
_X_I = tuple(name for name in _I if name != "cifar100")
_X_II = (
    "stanfordcars",
    "aircraft",
    "oxfordpet",
    "food",
    "sun397",
    "mnist",
    "flowers",
    "dtd",
    "caltech101",
    "eurosat",
)

COLLECTIONS = {
    each.name: each
    for each in (
        # Orders of ZSCL (ICCV 2023).
        Collection("mtil", _I, ("zscl", "coop"), {"I": _I, "II": _II}),
        # Orders and the one template of RAIL (NeurIPS 2024).
        Collection("xtail", _X_I, ("coop",), {"I": _X_I, "II": _X_II}, ("a photo of a {}.",)),
        Collection(
            "cil",
            ("cifar100", "cub", "imagenet-r", "imagenet100", "imagenet1k", "tinyimagenet"),
            ("cil",),
        ),
    )
}
