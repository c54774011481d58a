"""Tiny models, one of them with a text tower of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mulki.clip import models
from mulki.clip.models import VisionLanguageModel
from tests.clip.models.model_helpers import hf_architecture
from tests.train_helpers import load_tiny, tiny_models

__all__ = ["load_tiny", "tiny_models"]
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] a photo drawing of cat two dogs grass .".split()


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Hugging Face text transformer with its tokenizer, in a folder."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=len(WORDS),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture
def hf_model(bert: Path, tmp_path: Path) -> VisionLanguageModel:
    folder = tmp_path / "hf"
    shutil.copytree(bert, folder)  # open_clip looks for the tokenizer there
    (folder / "model.safetensors").unlink()  # but not for these weights
    config = {"model_cfg": hf_architecture(str(bert)), "preprocess_cfg": {"size": [32, 32]}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = models.load(f"local-dir:{folder}", stand_in=True)
    model.lock()
    return model
