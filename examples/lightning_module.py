"""A Lightning module that learns from two teachers, on one device or several.

    python examples/lightning_module.py --batch-size 16
    python examples/lightning_module.py --batch-size 8 --devices 2

teach a model of open_clip, which starts from random weights, made pictures and captions, 16 pairs a
step. The losses have the pairs of all processes as negatives, without an option that says so.
Needs: pip install lightning
"""

import argparse

import lightning as L
import open_clip
import torch
from torch.utils.data import DataLoader, TensorDataset

from mulki.losses import DualTeacherClipLoss


class Student(L.LightningModule):
    """The models are open_clip's, made with output_dict=True; the teachers do not change.

    Leave accumulate_grad_batches of the Trainer at 1, since a batch in parts has other negatives.
    """

    def __init__(self, clip, original, previous, lr=1e-5):
        super().__init__()
        self.clip = clip
        self.teachers = torch.nn.ModuleDict({"dist": original, "prev": previous})
        self.teachers.requires_grad_(False).eval()
        self.loss = DualTeacherClipLoss()
        self.lr = lr

    def training_step(self, batch, index):
        images, texts = batch
        out = self.clip(images, texts)
        with torch.no_grad():
            for name, teacher in self.teachers.items():
                out |= {f"{name}_{key}": value for key, value in teacher(images, texts).items()}
        losses = self.loss(**out, output_dict=True)
        self.log_dict(losses)
        return sum(losses.values())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.clip.parameters(), self.lr)


def made_pairs(clip, tokenizer, count=64):
    """Noise and numbers; in their place goes a data set of yours."""
    images = torch.randn(count, 3, *clip.visual.image_size)
    return TensorDataset(images, tokenizer([f"picture {i}" for i in range(count)]))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="ViT-S-32-alt", help="of open_clip")
    parser.add_argument("--batch-size", type=int, default=16, help="of each process")
    parser.add_argument("--devices", type=int, default=1, help="one process each")
    parser.add_argument("--lr", type=float, default=1e-4)
    given = parser.parse_args()
    L.seed_everything(0, verbose=False)
    clips = [open_clip.create_model(given.model, output_dict=True) for _ in range(3)]
    pairs = made_pairs(clips[0], open_clip.get_tokenizer(given.model))
    trainer = L.Trainer(
        max_epochs=1,
        devices=given.devices,
        strategy="ddp" if given.devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Student(*clips, lr=given.lr), DataLoader(pairs, given.batch_size))
    if trainer.is_global_zero:
        losses = trainer.callback_metrics.items()
        print(", ".join(f"{name} {float(value):.4f}" for name, value in losses))


if __name__ == "__main__":
    main()
