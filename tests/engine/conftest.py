"""Tiny models and tasks, shared with the tests one folder up."""

from __future__ import annotations

import sys
from pathlib import Path

# Run alone, this folder would not find the helpers of the folder above.
sys.path.insert(0, str(Path(__file__).parent.parent))

from engine_helpers import load_tiny, start_model, task_folders, tiny_models  # noqa: E402

__all__ = ["load_tiny", "start_model", "task_folders", "tiny_models"]
