"""Train ``mulki-mini``: EfficientNet-Lite0 and a text projection, aligned on captioned pictures.

    python -m benchmarks.embedded.pack.train_start_model --cache CACHE --pairs PAIRS \
        --pack mulki/data/embedded --work WORK --steps 8000

The whole image tower and both projections are trained; MiniLM stays frozen, so each caption is
encoded once. The state is saved every five minutes and a later call with the same ``--work`` goes
on from it. The pack's training pictures are looked at, never learned from; its test pictures are
not shown to the model. ``training_pictures`` has opened both, to leave near duplicates of them out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.embedded.pack import mini
from benchmarks.embedded.pack.augment import Views
from benchmarks.embedded.pack.sources import Cache
from mulki.clip.evaluation import Evaluator
from mulki.clip.models import BUNDLED, VisionLanguageModel
from mulki.data.loader import batches
from mulki.data.shards import open_pack
from mulki.data.subset import Subset
from mulki.files import replacing

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
        """Views ``[B, 3, 64, 64]``, and the captions and targets of `captioned`."""
        chosen = self.drawn(step)
        texts, shows = self.captioned(chosen)
        return self.viewed(chosen), texts, shows

    def drawn(self, step: int) -> Tensor:
        """Places ``[B]`` of the pictures of a step; what follows of it is drawn anew from here."""
        self.generator.manual_seed(self.seed * 1_000_003 + step)
        return torch.multinomial(self.weight, self.size, replacement=True, generator=self.generator)

    def viewed(self, chosen: Tensor) -> Tensor:
        """A view of each picture, ``[B, 3, 64, 64]`` in 0..1."""
        return self.views(self.images[chosen], self.kind[chosen])

    def captioned(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Caption indices ``[B]``, targets ``[B, B]`` (row: picture).

        A caption is right for every picture that shows its idea, whoever it was drawn with.
        """
        dice = torch.rand(len(chosen), 2, generator=self.generator).tolist()
        texts, idea = [], []
        for index, (first, second) in zip(chosen.tolist(), dice, strict=True):
            ideas = self.captions[index]
            at = int(first * len(ideas))
            texts.append(ideas[at][int(second * len(ideas[at]))])
            idea.append(self.ideas[index, at])
        shows = (self.ideas[chosen][:, None, :] == torch.stack(idea)[None, :, None]).any(-1)
        return torch.tensor(texts), shows.float()


@torch.no_grad()
def pooled(model, ids: Tensor) -> Tensor:
    """MiniLM's mean over tokens ``[B, 384]``: what the text projection is applied to."""
    mask = (ids != model.text.config.pad_token_id).long()
    output = model.text.transformer(input_ids=ids, attention_mask=mask)
    return model.text.pooler(output, mask).float()


def caption_features(model, tokens, texts: list[str], file: Path) -> Tensor:
    """MiniLM's pooled outputs ``[M, 384]``; kept in ``file`` for the next start."""
    known: dict[str, int] = {}
    stored = torch.empty(0, 384)
    if file.exists():
        state = torch.load(file, weights_only=True)
        known = {text: index for index, text in enumerate(state["texts"])}
        stored = state["features"]
    result = torch.empty(len(texts), 384)
    old = [index for index, text in enumerate(texts) if text in known]
    result[old] = stored[[known[texts[index]] for index in old]]
    order = [index for index, text in enumerate(texts) if text not in known]
    order.sort(key=lambda index: len(texts[index]))
    for start in range(0, len(order), 256):
        part = order[start : start + 256]
        ids = tokens([texts[index] for index in part])
        # Trailing padding is masked out by the encoder and only costs time.
        result[part] = pooled(model, ids[:, : int((ids != 0).sum(1).max())])
    if order:
        torch.save({"texts": texts, "features": result}, file)
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

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged values inside the block and its own again after it."""
        live, mean = list(self.live.values()), list(self.mean.values())
        with torch.no_grad():
            own = [value.clone() for value in live]
            torch._foreach_copy_(live, mean)
            yield
            torch._foreach_copy_(live, own)


class Looks:
    """Zero-shot accuracy on a fixed sample of the pack's training pictures."""

    def __init__(self, pack: Path, model: VisionLanguageModel, seed: int, count: int = 400) -> None:
        whole = open_pack(pack)
        tasks = [whole.task(name) for name in whole.tasks]
        generator = torch.Generator().manual_seed(seed)
        samples = []
        for task in tasks:
            part = torch.randperm(len(task.train), generator=generator)[:count]
            samples.append(Subset(task.train, part.tolist()))
        self.tasks = tasks
        loaders = [
            batches(s, model.preprocess, 256, shuffle=False, seed=seed, cached=True)
            for s in samples
        ]
        self.evaluator = Evaluator(model, tasks, loaders)

    def __call__(self) -> dict[str, float]:
        with torch.autocast("cpu", torch.bfloat16):
            return {
                task.name: round(self.evaluator.accuracy(number)[0], 1)
                for number, task in enumerate(self.tasks)
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cache", required=True, help="folder of fetched packages")
    parser.add_argument("--pairs", required=True, type=Path, help="folder of training pictures")
    parser.add_argument(
        "--pack", required=True, type=Path, help="the model goes to PACK/mulki-mini"
    )
    parser.add_argument("--work", required=True, type=Path, help="folder of the resumable state")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--stop-at", type=int, help="leave off after this step, schedule unchanged")
    parser.add_argument("--batch", type=int, default=192)
    parser.add_argument("--tower-rate", type=float, default=4e-4)
    parser.add_argument("--head-rate", type=float, default=1e-3)
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--decay", type=float, default=0.998, help="of the running average")
    parser.add_argument("--look-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    torch.manual_seed(options.seed)
    options.work.mkdir(parents=True, exist_ok=True)

    cache = Cache(options.cache)
    folder = mini.text_folder(cache)
    model, tokens = mini.build(folder), mini.tokenizer(folder)
    mini.load_imagenet(model.visual.trunk, cache)
    model.visual.to(memory_format=torch.channels_last)
    keep_depthwise_in_fp32(model.visual.trunk)
    pairs = Pairs(options.pairs, options.seed, options.batch, options.steps)
    captions = caption_features(model, tokens, pairs.texts, options.work / "captions.pt")
    looked_at = VisionLanguageModel(model, tokens, mini.preprocess(), BUNDLED)
    looks = Looks(options.pack, looked_at, options.seed)
    optimizer = torch.optim.AdamW(
        groups(model, options.tower_rate, options.head_rate), betas=(0.9, 0.98), fused=True
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    average = Average(model, options.decay)
    state_file, step = options.work / "state.pt", 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        for name, value in state["average"].items():
            average.mean[name].copy_(value)
        step = state["step"]
        print(f"resumed at step {step}", flush=True)

    def keep() -> None:
        live = {n: v for n, v in model.state_dict().items() if not n.startswith(mini.TRANSFORMER)}
        held = {"model": live, "optimizer": optimizer.state_dict(), "average": average.mean}
        with replacing(state_file) as partial:
            torch.save(held | {"step": step}, partial)
        with average.applied():
            mini.save(model, options.pack / "mulki-mini")

    saved = began = time.monotonic()
    first, since, total = step, step, 0.0
    end = min(options.steps, options.stop_at or options.steps)
    loader = torch.utils.data.DataLoader(
        pairs, batch_size=None, sampler=range(step, end), num_workers=1, prefetch_factor=4
    )
    for images, chosen, shows in loader:
        part = min((step + 1) / options.warm_up, 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / options.steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * part * (0.01 + 0.99 * cosine)
        model.train()
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
        step += 1
        average.update(step)
        total += loss.item()
        if step % 50 == 0 or step == first + 10:
            pace = (time.monotonic() - began) / (step - first)
            scale = model.logit_scale.exp().item()
            print(
                f"step {step}/{options.steps} loss {total / (step - since):.3f} scale {scale:.1f} "
                f"{pace:.3f} s a step, {pace * (end - step) / 60:.0f} min left",
                flush=True,
            )
            total, since = 0.0, step
        if step % options.look_every == 0:
            with average.applied():
                print(f"step {step} zero-shot on training pictures {looks()}", flush=True)
        if time.monotonic() - saved > 300:
            saved = time.monotonic()
            keep()
    keep()
    with average.applied():
        print(f"done: {step} steps, {looks()}", flush=True)


if __name__ == "__main__":
    main()
