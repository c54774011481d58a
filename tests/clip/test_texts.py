"""Texts are encoded in batches, and each process encodes its part of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from mulki.clip.texts import TextInputs, text_features, text_inputs
from mulki.distributed.world import World
from tests.ranks import run_ranks

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


class Lengths:
    """A model whose features of a text are twice its length; it counts what it is asked."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.prepared: list[int] = []
        self.encoded: list[int] = []

    def text_inputs(self, prompts: Sequence[str]) -> Tensor:
        self.prepared.append(len(prompts))
        return torch.tensor([[len(prompt)] for prompt in prompts])

    def encode_texts(self, batch: Tensor) -> Tensor:
        self.encoded.append(len(batch))
        return 2.0 * batch


def test_texts_are_encoded_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = Lengths()
    monkeypatch.setattr("mulki.clip.texts.TEXT_BATCH", 2)
    features = text_features(model, text_inputs(model, PROMPTS))
    assert features.flatten().tolist() == [2, 4, 6, 8, 10]
    assert model.prepared == [5] and model.encoded == [2, 2, 1]


def test_inputs_that_are_known_are_not_made_again() -> None:
    model: Any = Lengths()
    inputs = TextInputs(model)
    assert inputs(["a", "bb", "a"]).flatten().tolist() == [1, 2, 1]
    assert inputs(["dddd", "bb"]).flatten().tolist() == [4, 2]
    assert inputs(PROMPTS).flatten().tolist() == [1, 2, 3, 4, 5]
    assert model.prepared == [2, 1, 2]
    state = inputs.state()
    assert state["inputs"].flatten().tolist() == [1, 2, 4, 3, 5]
    again = TextInputs(model)
    again.restore(state)
    assert again([*PROMPTS, "ffffff"]).flatten().tolist() == [1, 2, 3, 4, 5, 6]
    assert model.prepared == [2, 1, 2, 1]


def on_a_rank(rank: int, size: int) -> tuple[list[int], list[float], list[int], list[int]]:
    model: Any = Lengths()
    world = World(rank, size)
    inputs = text_inputs(model, PROMPTS, world)
    features = text_features(model, inputs, world)
    return inputs.flatten().tolist(), features.flatten().tolist(), model.prepared, model.encoded


def test_every_process_gets_all_features_and_encodes_its_part() -> None:
    # Of five texts the second process encodes the last one twice: all parts have one length.
    assert run_ranks(2, on_a_rank) == [([1, 2, 3, 4, 5], [2, 4, 6, 8, 10], [3], [3])] * 2
