from __future__ import annotations

import torch
import torch.nn.functional as F

from mulki.clip.retrieval import ranks, right_captions, turned
from mulki.data.caption_task import CaptionedImages
from tests.data.data_helpers import Blank

TEXTS = (("a red flag",), ("a cat", "a tabby"), ("a red flag", "a dog"))


def test_a_caption_of_several_images_is_right_for_each() -> None:
    right = right_captions(CaptionedImages(Blank((0, 0, 0)), TEXTS))
    assert right == [[0], [1, 2], [0, 3]]
    assert turned(right, 4) == [[0, 2], [1], [1], [2]]


def test_a_caption_in_other_capitals_is_no_other_candidate() -> None:
    texts = (("A red flag", "a red flag"), ("a cat",), ("a RED  flag",))
    right = right_captions(CaptionedImages(Blank((0, 0, 0)), texts))
    assert right == [[0], [1], [0]]


def test_ranks_by_hand() -> None:
    candidates = torch.eye(3)
    queries = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.5, 0.8], [0.9, 0.5, 0.1]])
    found, said = ranks(queries, candidates, [[0], [0, 1], [2]])
    assert found.tolist() == [0, 1, 2]
    assert said.tolist() == [0, 2, 0]


def test_a_model_that_tells_nothing_apart_is_right_by_chance() -> None:
    same = torch.ones(6, 4)
    found, said = ranks(same, same, [[i] for i in range(6)])
    assert found.tolist() == [0, 1, 2, 3, 4, 5] and said.tolist() == [0] * 6


def test_ranks_of_many_queries_are_those_of_sorting() -> None:
    torch.manual_seed(0)
    queries = F.normalize(torch.randn(2500, 8), dim=-1)
    candidates = F.normalize(torch.randn(40, 8), dim=-1)
    right = [[i % 40, (7 * i) % 40] for i in range(2500)]
    found, said = ranks(queries, candidates, right)
    order = (queries @ candidates.T).argsort(dim=1, descending=True, stable=True)
    for query, places in enumerate(order.tolist()):
        assert found[query] == min(map(places.index, right[query]))
        assert said[query] == places[0]
