"""Presets: options that suit a named task sequence, and each method on it.

The values for "embedded" were tuned on the first tasks of order I alone; see benchmarks/embedded.
"""

from __future__ import annotations

from typing import Any

_Options = dict[str, Any]

SEQUENCES: dict[str, _Options] = {
    # float32: on CPUs the backward pass of depthwise convolutions is slower in bf16.
    "embedded": {"iterations": 80, "lr": 1e-4, "lock_text": True, "precision": "fp32"},
}
METHODS: dict[tuple[str, str], _Options] = {}
QUICK: dict[str, _Options] = {
    "embedded": {"iterations": 5, "batch_size": 32, "limit_images": 120},
}


def lookup(tasks: tuple[str, ...], method: str, preset: str) -> _Options:
    """The preset's options for a run; none where the tasks are the user's own."""
    sequence = tasks[0] if len(tasks) == 1 else ""
    options = SEQUENCES.get(sequence, {}) | METHODS.get((sequence, method), {})
    if preset == "quick":
        options = options | QUICK.get(sequence, {"iterations": 5, "limit_images": 120})
    return options
