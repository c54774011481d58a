"""A plain PyTorch loop: two teachers, and batches that are larger than the memory.

python examples/plain_loop.py

teaches the bundled start model pairs of flags and their names, for a few steps.
"""

import itertools

import torch

from mulki.losses import DualTeacherClipLoss
from mulki.train.microbatch import backward


def said(prefix, teacher, images, texts, micro_batch):
    """What a teacher makes of a batch, under the names that the loss gives it."""
    with torch.no_grad():
        parts = [
            teacher(*part)
            for part in zip(images.split(micro_batch), texts.split(micro_batch), strict=True)
        ]
    return {
        f"{prefix}image_features": torch.cat([p["image_features"] for p in parts]),
        f"{prefix}text_features": torch.cat([p["text_features"] for p in parts]),
        f"{prefix}logit_scale": parts[0]["logit_scale"],
    }


def train(clip, original, previous, batches, *, micro_batch, lr=1e-5):
    """One pass over `batches` of images and token ids; yields the losses of every step.

    The models are open_clip's, made with output_dict=True; the teachers do not change.
    """
    loss = DualTeacherClipLoss()
    optimizer = torch.optim.AdamW([p for p in clip.parameters() if p.requires_grad], lr, fused=True)
    for images, texts in batches:
        teachers = said("dist_", original, images, texts, micro_batch)
        teachers |= said("prev_", previous, images, texts, micro_batch)
        optimizer.zero_grad()
        # The gradients are those of the whole batch; the memory is that of a micro-batch.
        yield backward(
            lambda out, teachers=teachers: loss(**out, **teachers, output_dict=True),
            (clip, images, texts),
            micro_batch=micro_batch,
        )
        optimizer.step()


def main():
    from mulki.clip import models
    from mulki.data import load_sequence
    from mulki.data.loader import batches

    model = models.load("mulki-mini")
    model.clip.output_dict = True
    model.lock(text=True)
    original, previous = model.frozen_copy().clip, model.frozen_copy().clip
    model.train()
    flags = next(task for task in load_sequence(["embedded"], "I") if task.name == "flags")
    tokens = model.tokenizer([prompts[0] for prompts in flags.prompts()])
    pairs = (
        (images, tokens[target])
        for images, target, _ in batches(flags.train, model.preprocess, 48, shuffle=True, seed=0)
    )
    few = itertools.islice(pairs, 2)
    for losses in train(model.clip, original, previous, few, micro_batch=16):
        print(", ".join(f"{name} {value:.4f}" for name, value in losses.items()))


if __name__ == "__main__":
    main()
