"""The tiny model and tasks of whole runs on several processes."""

from __future__ import annotations

from tests.train.conftest import base
from tests.train_helpers import start_model, tiny_models

__all__ = ["base", "start_model", "tiny_models"]
