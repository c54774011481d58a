from __future__ import annotations

import pytest
import torch


@pytest.fixture
def weights():
    """A model's trainable parameters: one of ones, one of zeros."""
    return {"a": torch.nn.Parameter(torch.ones(3)), "b": torch.nn.Parameter(torch.zeros(()))}
