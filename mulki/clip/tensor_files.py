"""Safetensors files that carry a checksum of their content."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mulki.errors import InputError
from mulki.files import check_regular, replacing

CHECKSUM = "sha256"


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; an older one stays until the new one has been read back.

    Args:
        tensors: contiguous, on the CPU; no two share memory.
        metadata: kept beside them, with a checksum of all.

    Raises:
        OSError: it cannot be written, or reads otherwise than it was written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    checksum = _digest(tensors, metadata)
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={**metadata, CHECKSUM: checksum})
        except SafetensorError as error:
            code = re.search(r"os error (\d+)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None
        try:
            load_tensors(temporary)
        except InputError:
            raise OSError(errno.EIO, "what was written reads differently", str(path)) from None


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; the metadata without the checksum.

    A file without a checksum, which another program has written, is taken as it is.

    Raises:
        InputError: it cannot be read, or its content does not have its checksum.
    """
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a whole safetensors file ({reason}); restore it or pass another"
        ) from None
    checksum = metadata.pop(CHECKSUM, None)
    if checksum is not None and checksum != _digest(tensors, metadata):
        raise InputError(
            f"{path}: damaged, its content does not have its checksum; restore it or pass another"
        )
    return tensors, metadata


def checksum_of(path: str | os.PathLike[str]) -> str | None:
    """The checksum that a safetensors file carries; its content is not read."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(CHECKSUM)


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of those that hold a NaN or an infinity."""
    return [
        name
        for name, value in tensors.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(repr(sorted(metadata.items())).encode())
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
