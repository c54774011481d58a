"""A Lightning module that learns from two teachers.

pip install lightning

    clip, original, previous = (open_clip.create_model("ViT-B-32", ..., output_dict=True) for ...)
    L.Trainer(precision="bf16-mixed").fit(Student(clip, original, previous), loader)

where `loader` gives images and token ids.
"""

import lightning as L
import torch

from mulki.losses import DualTeacherClipLoss


class Student(L.LightningModule):
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
