"""Reading models of Hugging Face without a network."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep the Hugging Face hub, and what asks it, to what is on this machine."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
