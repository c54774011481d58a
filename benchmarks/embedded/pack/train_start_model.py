"""Train ``mulki-mini``: EfficientNet-Lite0 and a text projection, aligned on captioned pictures.

    python -m benchmarks.embedded.pack.train_start_model --cache CACHE --pairs PAIRS \
        --pack mulki/data/embedded --steps 4700

The whole image tower and both projections are trained; MiniLM stays frozen, so each caption is
encoded once. No picture of the pack is shown to the model; ``training_pictures`` has opened them,
to leave near duplicates of them out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.embedded.pack import mini
from benchmarks.embedded.pack.augment import Views
from benchmarks.embedded.pack.sources import Cache

TOWER_RATE, HEAD_RATE, WARM_UP = 4e-4, 1e-3, 200
DECAY = 0.998  # of the running average of the weights

# Share of a batch by the beginning of the source's name. Within a share pictures are equally
# likely, animals excepted: each of the ten has an equal part, and heads have a fifth of it.
SHARES = {
    "digits": 0.05, "digits by hand": 0.09, "letters": 0.08, "letters by hand": 0.05,
    "animal ": 0.19, "flags ": 0.12, "emoji ": 0.17, "icons ": 0.08, "drawings ": 0.05,
    "stamps": 0.07, "cards": 0.05,
}  # fmt: skip


def weights(sources: list[str]) -> Tensor:
    """Probability ``[N]`` of each picture."""
    counts: dict[str, int] = {}
    for source in sources:
        counts[source] = counts.get(source, 0) + 1
    share = {}
    for prefix, part in SHARES.items():
        members = [s for s in counts if s == prefix or (prefix[-1] == " " and s.startswith(prefix))]
        total = sum(counts[s] for s in members)
        for source in members:
            if prefix == "animal ":
                head = source.endswith(" head")
                both = source.removesuffix(" head") + ("" if head else " head") in counts
                portion = (0.2 if head else 0.8) if both else 1.0
                share[source] = part / 10 * portion / counts[source]
            else:
                share[source] = part / total
    return torch.tensor([share[source] for source in sources], dtype=torch.float64)


class Pairs(torch.utils.data.Dataset):
    """Batches by step number: pictures by weight, then an idea of each, then one of its captions.

    A batch depends on the seed and the step alone, so an interrupted run goes on as it would have.
    """

    def __init__(self, folder: Path, seed: int, size: int, steps: int) -> None:
        self.seed, self.size, self.steps = seed, size, steps
        table = json.loads((folder / "pairs.json").read_text())
        self.texts: list[str] = table["texts"]
        self.images = torch.from_numpy(np.load(folder / "images.npy")).permute(0, 3, 1, 2)
        rows = table["pairs"]
        self.kind = torch.tensor([row["kind"] for row in rows])
        self.weight = weights([row["source"] for row in rows])
        self.generator = torch.Generator()
        self.views = Views(self.generator)
        widest = max(len({idea for _, idea in row["captions"]}) for row in rows)
        # Ideas of each picture, padded by -1, and for each idea its captions.
        self.ideas = torch.full((len(rows), widest), -1)
        self.captions: list[list[list[int]]] = []
        for index, row in enumerate(rows):
            by_idea: dict[int, list[int]] = {}
            for text, idea in row["captions"]:
                by_idea.setdefault(idea, []).append(text)
            self.ideas[index, : len(by_idea)] = torch.tensor(list(by_idea))
            self.captions.append(list(by_idea.values()))

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views ``[B, 3, 64, 64]``, caption indices ``[B]``, targets ``[B, B]`` (row: picture).

        A caption is right for every picture that shows its idea, whoever it was drawn with.
        """
        self.generator.manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.multinomial(
            self.weight, self.size, replacement=True, generator=self.generator
        )
        dice = torch.rand(len(chosen), 2, generator=self.generator).tolist()
        texts, idea = [], []
        for index, (first, second) in zip(chosen.tolist(), dice, strict=True):
            ideas = self.captions[index]
            at = int(first * len(ideas))
            texts.append(ideas[at][int(second * len(ideas[at]))])
            idea.append(self.ideas[index, at])
        shows = (self.ideas[chosen][:, None, :] == torch.stack(idea)[None, :, None]).any(-1)
        views = self.views(self.images[chosen], self.kind[chosen])
        return views, torch.tensor(texts), shows.float()


@torch.no_grad()
def caption_features(model, tokens, texts: list[str]) -> Tensor:
    """MiniLM's mean over tokens ``[M, 384]``: what the text projection is applied to."""
    result = torch.empty(len(texts), 384)
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    for start in range(0, len(order), 256):
        part = order[start : start + 256]
        ids = tokens([texts[index] for index in part])
        # Trailing padding is masked out by the encoder and only costs time.
        ids = ids[:, : int((ids != 0).sum(1).max())]
        mask = (ids != model.text.config.pad_token_id).long()
        output = model.text.transformer(input_ids=ids, attention_mask=mask)
        result[part] = model.text.pooler(output, mask).float()
    return result


def contrastive(image: Tensor, text: Tensor, scale: Tensor, shows: Tensor) -> Tensor:
    """Symmetric cross-entropy with the probability spread evenly over all right partners."""
    logits = scale * image @ text.T
    rows = shows / shows.sum(1, keepdim=True)
    columns = (shows / shows.sum(0, keepdim=True)).T
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


def groups(model, tower_rate: float, head_rate: float) -> list[dict]:
    tower, plain, heads = [], [], []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or name == "logit_scale":
            continue
        if name.startswith("visual.trunk"):
            (tower if parameter.ndim > 1 else plain).append(parameter)
        else:
            heads.append(parameter)
    return [
        {"params": tower, "lr": tower_rate, "weight_decay": 0.05},
        {"params": plain, "lr": tower_rate, "weight_decay": 0.0},
        {"params": heads, "lr": head_rate, "weight_decay": 0.05},
        {"params": [model.logit_scale], "lr": head_rate, "weight_decay": 0.0},
    ]


def keep_depthwise_in_fp32(trunk: nn.Module) -> None:
    """Leave autocast for depthwise convolutions: their bf16 backward is 3 to 5 times slower."""

    def wrap(module: nn.Module) -> None:
        inner = module.forward

        def forward(x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False):
                return inner(x.float()).bfloat16()

        module.forward = forward

    for module in trunk.modules():
        if isinstance(module, nn.Conv2d) and module.groups > 1:
            wrap(module)


class Average:
    """Running average of weights and BatchNorm statistics; short-sighted while young."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.live = {
            name: value
            for name, value in model.state_dict().items()
            if value.is_floating_point() and not name.startswith(mini.TRANSFORMER)
        }
        self.mean = {name: value.detach().clone() for name, value in self.live.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (20 + step))
        torch._foreach_lerp_(list(self.mean.values()), list(self.live.values()), 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Give the model the averaged values."""
        torch._foreach_copy_(list(self.live.values()), list(self.mean.values()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cache", required=True, help="folder of fetched packages")
    parser.add_argument("--pairs", required=True, type=Path, help="folder of training pictures")
    parser.add_argument(
        "--pack", required=True, type=Path, help="the model goes to PACK/mulki-mini"
    )
    parser.add_argument("--steps", type=int, default=4700)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)

    cache = Cache(options.cache)
    folder = mini.text_folder(cache)
    model = mini.build(folder)
    mini.load_imagenet(model.visual.trunk, cache)
    model.visual.to(memory_format=torch.channels_last)
    keep_depthwise_in_fp32(model.visual.trunk)
    pairs = Pairs(options.pairs, options.seed, options.batch, options.steps)
    captions = caption_features(model, mini.tokenizer(folder), pairs.texts)
    optimizer = torch.optim.AdamW(
        groups(model, TOWER_RATE, HEAD_RATE), betas=(0.9, 0.98), fused=True
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    average = Average(model, DECAY)
    began, total = time.monotonic(), 0.0
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=None, sampler=range(options.steps), num_workers=1, prefetch_factor=4
    )
    model.train()
    for step, (images, chosen, shows) in enumerate(loader):
        part = min((step + 1) / WARM_UP, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * part * (0.01 + 0.99 * cosine)
        images = (images * 2 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            image = model.encode_image(images)
            text = model.text.proj(captions[chosen])
        loss = contrastive(
            F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1),
            model.logit_scale.exp(), shows,
        )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        average.update(step + 1)
        total += loss.item()
        if (step + 1) % 50 == 0:
            pace = (time.monotonic() - began) / (step + 1)
            scale = model.logit_scale.exp().item()
            print(
                f"step {step + 1}/{options.steps} loss {total / 50:.3f} scale {scale:.1f} "
                f"{pace:.3f} s a step, {pace * (options.steps - step) / 60:.0f} min left",
                flush=True,
            )
            total = 0.0
    average.apply()
    mini.save(model, options.pack / "mulki-mini")


if __name__ == "__main__":
    main()
