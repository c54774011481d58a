from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from mulki.clip.models import VisionLanguageModel
from mulki.clip.models.huggingface.names import from_huggingface, to_huggingface
from mulki.errors import InputError
from tests.train_helpers import load_tiny, same_state, state_of, tiny_models

__all__ = ["load_tiny", "tiny_models"]
Load = Callable[..., VisionLanguageModel]


def test_there_and_back_is_the_same(load_tiny: Load) -> None:
    state = state_of(load_tiny())
    there = to_huggingface(state)
    assert there.keys() != state.keys()
    assert same_state(from_huggingface(there, state), state)
    numbers = {"vision_model.embeddings.position_ids": torch.arange(5)[None]}
    assert same_state(from_huggingface(there | numbers, state), state)


def test_half_precision_becomes_float32(load_tiny: Load) -> None:
    state = state_of(load_tiny())
    half = {name: value.half() for name, value in to_huggingface(state).items()}
    found = from_huggingface(half, state)
    assert {value.dtype for value in found.values()} == {torch.float32}


def test_what_does_not_fit_is_named(load_tiny: Load) -> None:
    state = state_of(load_tiny())
    there = to_huggingface(state)
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    with pytest.raises(InputError, match=f" {name}"):
        from_huggingface({n: v for n, v in there.items() if n != name}, state)
    with pytest.raises(InputError, match=f"{name} .*\\[2, 3\\]"):
        from_huggingface(there | {name: torch.zeros(2, 3)}, state)
    with pytest.raises(InputError, match="classifier.weight"):
        from_huggingface(there | {"classifier.weight": torch.zeros(2)}, state)


def test_a_name_that_neither_has(load_tiny: Load) -> None:
    with pytest.raises(KeyError, match="visual.bn1.weight"):
        to_huggingface({"visual.bn1.weight": torch.zeros(2)})
