"""What the packages of trackers find in the files that a run has written for them."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Of the log in which wandb keeps the records of an offline run.
_BLOCK, _HEADER, _WHOLE, _LAST = 32768, 7, 1, 4


def tensorboard_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Points (step, value) by name; the test is skipped where the package is not installed."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    reader = pytest.importorskip(name, reason="needs tensorboard").EventAccumulator(str(folder))
    reader.Reload()
    return {
        name: [(event.step, event.value) for event in reader.Scalars(name)]
        for name in reader.Tags()["scalars"]
    }


def wandb_records(folder: Path) -> list[Any]:
    """The records of the one run in this folder; skipped where the package is not installed."""
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2", reason="needs wandb")
    (file,) = folder.glob("offline-run-*/run-*.wandb")
    found = []
    for content in _log_records(file.read_bytes()):
        found.append(protocol.Record())
        found[-1].ParseFromString(content)
    return found


def wandb_curves(folder: Path) -> list[dict[str, float]]:
    """The values of each call that logged some."""
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in r.history.item
        }
        for r in wandb_records(folder)
        if r.HasField("history")
    ]


def _log_records(data: bytes) -> Iterator[bytes]:
    assert data[:4] == b":W&B"
    place, pending = _HEADER, b""
    while place < len(data):
        rest = _BLOCK - place % _BLOCK
        if rest < _HEADER:
            place += rest
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        place += _HEADER
        pending += data[place : place + length]
        place += length
        if kind in (_WHOLE, _LAST):
            yield pending
            pending = b""
