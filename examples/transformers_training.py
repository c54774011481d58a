"""CLIP or SigLIP of transformers with our losses, and the pairs of all processes as negatives.

torchrun --nproc-per-node 4 examples/transformers_training.py clip/ pairs.csv

teaches the model in a folder of transformers the pairs of a CSV with the columns path and caption.
The loss of transformers' own models (return_loss=True) knows the pairs of its process alone.
"""

import argparse
import csv
import os
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

from mulki.losses import ClipLoss, SigLipLoss


def said(model, batch, prefix=""):
    """What a model makes of a batch, under the names that the losses give it."""
    out = model(**batch)
    # DistributedDataParallel has the model inside.
    own = getattr(model, "module", model)
    found = {
        "image_features": out.image_embeds,
        "text_features": out.text_embeds,
        "logit_scale": own.logit_scale.exp().reshape(()),
    }
    if hasattr(own, "logit_bias"):
        found["logit_bias"] = own.logit_bias.reshape(())
    return out, {f"{prefix}{name}": value for name, value in found.items()}


def losses_of(model, batch, loss, **teachers):
    """The output of a model for a batch, and the terms of a loss of `mulki.losses`.

    Teachers are models by the prefix of their features: `dist` for DistillClipLoss, `dist` (the
    original) and `prev` (the one before this task) for DualTeacherClipLoss.
    """
    out, given = said(model, batch)
    with torch.no_grad():
        for name, teacher in teachers.items():
            given |= said(teacher, batch, f"{name}_")[1]
    return out, loss(**given, output_dict=True)


class PairTrainer(transformers.Trainer):
    """transformers' Trainer with a loss of `mulki.losses`, and frozen teachers if it has any.

    Keep gradient_accumulation_steps at 1, since a batch in parts has other negatives;
    `mulki.train.microbatch.backward` takes a batch in parts with its own gradients.
    """

    def __init__(self, *args, loss, teachers=None, **options):
        super().__init__(*args, **options)
        self.pair_loss = loss
        self.teachers = {n: t.to(self.args.device).eval() for n, t in (teachers or {}).items()}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The sum of the terms; called by the Trainer in every step."""
        out, terms = losses_of(model, inputs, self.pair_loss, **self.teachers)
        total = sum(terms.values())
        return (total, out) if return_outputs else total


def train(model, batches, *, loss, optimizer, **teachers):
    """One pass over `batches` of what the processor makes; yields the terms of every step."""
    for batch in batches:
        _, terms = losses_of(model, batch, loss, **teachers)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        yield {name: value.detach() for name, value in terms.items()}


def main():
    from PIL import Image

    parser = argparse.ArgumentParser()
    parser.add_argument("model", help="a folder that transformers has saved")
    parser.add_argument("pairs", type=Path, help="a CSV with the columns path and caption")
    parser.add_argument("--batch-size", type=int, default=32, help="of each process")
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--out", default="trained", help="where the model goes")
    given = parser.parse_args()
    rank = world = 0
    if "RANK" in os.environ:
        dist.init_process_group()
        rank, world = dist.get_rank(), dist.get_world_size()
    # Each process has a GPU of its own, if there are any.
    device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    own = transformers.AutoModel.from_pretrained(given.model, local_files_only=True).to(device)
    processor = transformers.AutoProcessor.from_pretrained(given.model, local_files_only=True)
    with given.pairs.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if world:  # as many for each process: one without a batch would let the others wait
        rows = rows[: len(rows) // world * world][rank::world]
    if len(rows) < given.batch_size:
        parser.error(
            f"{len(rows)} pairs for each process, fewer than --batch-size {given.batch_size}"
        )

    def batches():
        for start in range(0, len(rows) - given.batch_size + 1, given.batch_size):
            part = rows[start : start + given.batch_size]
            images = [Image.open(given.pairs.parent / row["path"]).convert("RGB") for row in part]
            made = processor(
                images=images,
                text=[row["caption"] for row in part],
                padding="max_length",
                truncation=True,
                return_tensors="pt",
            )
            # SigLIP pads, and reads its padding.
            made.pop("attention_mask", None)
            yield made.to(device)

    model = torch.nn.parallel.DistributedDataParallel(own) if world else own
    loss = SigLipLoss() if hasattr(own, "logit_bias") else ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), given.lr)
    steps = train(model, batches(), loss=loss, optimizer=optimizer)
    for step, terms in enumerate(steps, start=1):
        if rank == 0:
            print(step, ", ".join(f"{name} {value:.4f}" for name, value in terms.items()))
    if rank == 0:
        own.save_pretrained(given.out)
        processor.save_pretrained(given.out)
    if world:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
