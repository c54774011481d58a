"""Tiny models to export."""

from tests.train_helpers import load_tiny, tiny_models

__all__ = ["load_tiny", "tiny_models"]
