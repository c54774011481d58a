"""Answers of a run as a short text for a line of `results.jsonl`: packed bits, zlib, base64."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

from mulki.intervals import RunAnswers


def pack(answers: RunAnswers) -> dict[str, Any]:
    """Test images of each task in the order learned, and the bits of all arrays."""
    arrays = [kind[task].ravel() for kind in (answers.own, answers.seen) for task in answers.sizes]
    bits = zlib.compress(np.packbits(np.concatenate(arrays)).tobytes(), 9)
    return {"images": answers.sizes, "bits": base64.b64encode(bits).decode("ascii")}


def unpack(packed: dict[str, Any]) -> RunAnswers:
    """What `pack` was given."""
    sizes = packed["images"]
    tasks = len(sizes)
    content = zlib.decompress(base64.b64decode(packed["bits"]))
    count = 2 * tasks * sum(sizes.values())
    bits = np.unpackbits(np.frombuffer(content, np.uint8), count=count).astype(bool)
    halves = []
    for half in np.split(bits, 2):
        parts = np.split(half, np.cumsum([tasks * n for n in sizes.values()])[:-1])
        halves.append(
            {
                task: part.reshape(tasks, n)
                for (task, n), part in zip(sizes.items(), parts, strict=True)
            }
        )
    return RunAnswers(*halves)
