"""Where published data sets lie on this machine, and which protocol they are read with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from mulki.data.published.entries import Entry
from mulki.errors import InputError


@dataclass(frozen=True)
class Source:
    """A folder of published data sets and a protocol.

    Attributes:
        root: torchvision's data root, one folder a data set; None if the user gave none.
        protocol: a name in `mulki.data.published.PROTOCOLS`; None for that of the sequence.
        absent: told of each data set that is not there; blank images then stand in for it. None: a
            data set that is not there is an error.
    """

    root: str | os.PathLike[str] | None = None
    protocol: str | None = None
    absent: Callable[[Entry], None] | None = field(default=None, compare=False)

    def folder(self) -> Path:
        """The data root, as an absolute path.

        Raises:
            InputError: none was given, or it is no folder. One that does not exist is one without
                data sets where `absent` is given.
        """
        if self.root is None:
            raise InputError(
                "--data-root: published data sets are wanted and no folder was given; pass the one "
                "that holds them, which mulki tasks mtil --prepare --data-root DIR fills"
            )
        path = Path(os.path.abspath(Path(self.root).expanduser()))
        if not path.is_dir() and (path.exists() or self.absent is None):
            raise InputError(
                f"--data-root: {path} is not a folder; pass the one that holds the data sets"
            )
        return path
