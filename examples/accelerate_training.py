"""A loop of accelerate that learns from a teacher, on one process or many.

    python examples/accelerate_training.py --batch-size 16
    torchrun --nproc-per-node 2 examples/accelerate_training.py --batch-size 8

teach a model of open_clip, which starts from random weights, made pictures and captions. Both take
the same steps: the losses have the pairs of all processes as negatives, without an option that says
so. On GPUs accelerate launch starts the processes, too. Needs: pip install accelerate
"""

import argparse

import open_clip
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

from mulki.losses import DistillClipLoss


def train(clip, teacher, loader, *, accelerator, lr=1e-5):
    """One pass over batches of images and token ids; yields the losses of every step.

    The models are open_clip's, made with output_dict=True; the teacher does not change. Leave
    gradient_accumulation_steps of the Accelerator at 1, since a batch in parts has other negatives.
    """
    loss = DistillClipLoss()
    optimizer = torch.optim.AdamW(clip.parameters(), lr)
    clip, optimizer, loader = accelerator.prepare(clip, optimizer, loader)
    teacher = teacher.requires_grad_(False).eval().to(accelerator.device)
    for images, texts in loader:
        out = clip(images, texts)
        with torch.no_grad(), accelerator.autocast():
            said = teacher(images, texts)
        losses = loss(**out, **{f"dist_{k}": v for k, v in said.items()}, output_dict=True)
        optimizer.zero_grad()
        accelerator.backward(sum(losses.values()))
        optimizer.step()
        yield {name: value.detach() for name, value in losses.items()}


def made_pairs(clip, tokenizer, count=64):
    """Noise and numbers; in their place goes a data set of yours."""
    images = torch.randn(count, 3, *clip.visual.image_size)
    return TensorDataset(images, tokenizer([f"picture {i}" for i in range(count)]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-S-32-alt", help="of open_clip")
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--lr", type=float, default=1e-4)
    given = parser.parse_args()
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)
    clip, teacher = (open_clip.create_model(given.model, output_dict=True) for _ in range(2))
    pairs = made_pairs(clip, open_clip.get_tokenizer(given.model))
    loader = DataLoader(pairs, given.batch_size)
    for losses in train(clip, teacher, loader, accelerator=accelerator, lr=given.lr):
        accelerator.print(", ".join(f"{name} {value:.4f}" for name, value in losses.items()))
    accelerator.end_training()


if __name__ == "__main__":
    main()
