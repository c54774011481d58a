"""A step of training for each public function: what is captured, and run on streams."""

from __future__ import annotations

import torch

from mulki import Similarity, functional

LOSSES = ("cross_entropy", "dual_teacher_kl", "contrastive", "siglip", "similarity")
SIZES = {"small": (64, 100, 512), "chunked": (4096, 1024, 64)}


class Step:
    """Passes of a public function, on leaves of its own."""

    def __init__(self, name, size="small", device="cuda"):
        n, p, d = SIZES[size]
        generator = torch.Generator(device).manual_seed(0)

        def rows(count, width=d):
            drawn = torch.randn(count, width, generator=generator, device=device)
            return torch.nn.functional.normalize(drawn, dim=1).bfloat16()

        def number(value):
            return torch.tensor(value, device=device).requires_grad_()

        self.name = name
        p = n if name in ("contrastive", "siglip") else p
        self.x, self.w = rows(n).requires_grad_(), rows(p).requires_grad_()
        self.scale, self.bias = number(20.0), number(-5.0)
        self.target = torch.randint(p, (n,), generator=generator, device=device)
        self.mask = torch.ones(p, dtype=torch.bool, device=device)
        self.first, self.second = (Similarity(rows(n, w), rows(p, w), 20.0) for w in (d, 2 * d))
        self.leaves = [self.x, self.w, self.scale]
        if name == "siglip":
            self.leaves.append(self.bias)

    def loss(self):
        pair = self.x, self.w, self.scale
        student = Similarity(*pair)
        if self.name == "cross_entropy":
            return functional.prototype_cross_entropy(
                student, self.target, label_smoothing=0.1, class_mask=self.mask
            )
        if self.name == "dual_teacher_kl":
            return functional.dual_teacher_kl(
                student, self.first, self.second, target=self.target, class_mask=self.mask
            )
        if self.name == "similarity":
            return functional.prototype_similarity(*pair, normalize=True).float().square().mean()
        if self.name == "contrastive":
            return functional.clip_contrastive(*pair)
        return functional.siglip(*pair, self.bias)

    def __call__(self):
        """The loss, the loss without gradients (which may be another kernel), the gradients."""
        loss = self.loss()
        with torch.no_grad():
            alone = self.loss()
        return (loss.detach(), alone, *torch.autograd.grad(loss, self.leaves))

    def draw_again(self):
        with torch.no_grad():
            self.x.copy_(self.x.flip(0))
            self.w.copy_(self.w.flip(1))
            self.target.copy_(self.target.flip(0))
            self.scale.mul_(1.5)
