"""Answers of a run as a short text for a line of the results: packed bits, zlib, base64.

The bits are what changes from one evaluation to the next, which is little.
"""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np

from mulki.runs.intervals import RunAnswers


def pack(answers: RunAnswers) -> dict[str, Any]:
    """Test images of each task in the order learned, and the bits of all arrays."""
    both = [answers] if answers.head is None else [answers, answers.head]
    kinds = [kind for each in both for kind in (each.own, each.seen)]
    arrays = [kind[task] for kind in kinds for task in answers.sizes]
    changes = [np.diff(array, axis=0, prepend=False).ravel() for array in arrays]
    bits = zlib.compress(np.packbits(np.concatenate(changes)).tobytes(), 9)
    text = base64.b64encode(bits).decode("ascii")
    return {"images": answers.sizes, "kinds": len(kinds), "bits": text}


def unpack(packed: dict[str, Any]) -> RunAnswers:
    """What `pack` was given."""
    sizes = packed["images"]
    tasks = len(sizes)
    content = zlib.decompress(base64.b64decode(packed["bits"]))
    # Lines of before there was a head have two.
    kinds = packed.get("kinds", 2)
    count = kinds * tasks * sum(sizes.values())
    bits = np.unpackbits(np.frombuffer(content, np.uint8), count=count).astype(bool)
    found = []
    for kind in np.split(bits, kinds):
        parts = np.split(kind, np.cumsum([tasks * n for n in sizes.values()])[:-1])
        found.append(
            {
                task: np.logical_xor.accumulate(part.reshape(tasks, n), axis=0)
                for (task, n), part in zip(sizes.items(), parts, strict=True)
            }
        )
    return RunAnswers(*found[:2], RunAnswers(*found[2:]) if kinds > 2 else None)
