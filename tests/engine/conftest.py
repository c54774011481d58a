"""Tiny models and tasks, shared with the tests one folder up."""

from __future__ import annotations

from tests.engine_helpers import load_tiny, start_model, task_folders, tiny_models

__all__ = ["load_tiny", "start_model", "task_folders", "tiny_models"]
