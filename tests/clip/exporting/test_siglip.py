from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mulki.clip.exporting.siglip import siglip_config, siglip_tokenizer
from mulki.clip.models.huggingface.reading import load_huggingface
from mulki.errors import InputError
from tests.clip.models.huggingface.folders import saved, siglip_model, tokenizer_of_words


def test_the_configuration_and_the_words_are_those_that_came_in(tmp_path: Path) -> None:
    theirs = siglip_model()
    model: Any = load_huggingface(str(saved(theirs, tmp_path, tokenizer_of_words())))
    found, wanted = siglip_config(model).to_dict(), theirs.config.to_dict()
    shape = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    for key in (*shape, "hidden_act", "layer_norm_eps"):
        for tower in ("text_config", "vision_config"):
            assert found[tower][key] == wanted[tower][key], key
    assert found["text_config"]["projection_size"] == 24
    tokenizer = siglip_tokenizer(model)
    assert tokenizer.model_max_length == 12 and tokenizer is not model.tokenizer.tokenizer


def test_other_tokens_are_refused(tmp_path: Path) -> None:
    model: Any = load_huggingface(str(saved(siglip_model(), tmp_path, tokenizer_of_words())))
    model.tokenizer.clean_fn = lambda text: f"two {text}"
    with pytest.raises(InputError, match="tokens.*--to onnx"):
        siglip_tokenizer(model)


def test_another_tower_is_none_of_siglip(tmp_path: Path) -> None:
    model: Any = load_huggingface(str(saved(siglip_model(), tmp_path, tokenizer_of_words())))
    del model.clip.visual.trunk
    with pytest.raises(AttributeError, match="trunk"):
        siglip_config(model)
