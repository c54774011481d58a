"""Tiny models to export."""

from tests.engine_helpers import load_tiny, tiny_models

__all__ = ["load_tiny", "tiny_models"]
