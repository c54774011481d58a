"""Safetensors files that carry a checksum of their content, and whose bytes repeat."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mulki.errors import InputError
from mulki.files import check_regular, replacing

CHECKSUM = "sha256"

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file; an older one stays until the new one has been read back.

    safetensors' own writer orders metadata by chance, and lets the owner alone read the file.

    Args:
        tensors: on the CPU.
        metadata: kept beside them, with a checksum of all.

    Raises:
        OSError: it cannot be written, or reads otherwise than it was written.
    """
    known = {**metadata, CHECKSUM: _digest(tensors, metadata)}
    header: dict[str, Any] = {"__metadata__": dict(sorted(known.items()))}
    # Large elements first, so that each lies at a multiple of its size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    end = 0
    for name, value in ordered:
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape)}
        header[name]["data_offsets"] = [begin, end]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as temporary:
        try:
            with temporary.open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                for _, value in ordered:
                    file.write(_bytes(value))
            load_tensors(temporary)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from None
        except InputError:
            raise OSError(errno.EIO, "what was written reads differently", str(path)) from None


def read_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file, without a look at its tensors or its checksum.

    Raises:
        InputError: it cannot be read.
    """
    return _read(path, lambda file: dict(file.metadata() or {}))


def load_tensors(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file; its checksum is among the latter.

    A file without a checksum, which another program has written, is taken as it is.

    Raises:
        InputError: it cannot be read, or its content does not have its checksum.
    """
    metadata = read_metadata(path)
    tensors: dict[str, Tensor] = _read(
        path,
        lambda file: {name: file.get_tensor(name) for name in file.keys()},  # noqa: SIM118
    )
    if CHECKSUM in metadata and metadata[CHECKSUM] != _digest(tensors, metadata):
        raise InputError(
            f"{path}: damaged, its content does not have its checksum; restore it or pass another"
        )
    return tensors, metadata


def check_floats(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Check that weights of a model are no whole numbers, which torch would cast in silence.

    Args:
        tensors: the weights that came, by their names.
        own: those of the model.

    Raises:
        InputError: naming one of them.
    """
    for name, value in tensors.items():
        wanted = own.get(name)
        if wanted is None or value.is_floating_point() or not wanted.is_floating_point():
            continue
        raise InputError(f"{name} is {value.dtype}, wanted floating point numbers; convert it")


def _read(path: str | os.PathLike[str], of: Callable[[Any], Any]) -> Any:
    from safetensors import SafetensorError, safe_open

    check_regular(path)
    try:
        with safe_open(path, "pt") as file:
            return of(file)
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a whole safetensors file ({reason}); restore it or pass another"
        ) from None


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    known = sorted(item for item in metadata.items() if item[0] != CHECKSUM)
    digest = hashlib.sha256(repr(known).encode())
    for name, value in sorted(tensors.items()):
        digest.update(repr((name, str(value.dtype), tuple(value.shape))).encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data
