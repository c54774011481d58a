"""Random views of RGBA pictures, computed for a whole batch at once.

The views are what keeps the start model from learning any one vendor's look: pictures are moved,
turned, bent, recoloured, laid on other backgrounds, thinned, thickened and coarsened. Each kind of
picture (see ``training_pictures.py``) has another mixture, because a mirrored letter is another
sign and a recoloured flag another country.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.embedded.pack.training_pictures import (
    DRAWING,
    FLAG,
    GLYPH,
    ICON,
    MARKED,
    SILHOUETTE,
)

# Per kind: turn in degrees, widest and narrowest scale, shear, shift, bend.
MOVES = {
    GLYPH: (14.0, 0.62, 1.12, 0.22, 0.10, 0.055),
    ICON: (12.0, 0.65, 1.15, 0.10, 0.10, 0.030),
    DRAWING: (14.0, 0.65, 1.25, 0.12, 0.10, 0.030),
    FLAG: (6.0, 0.75, 1.15, 0.08, 0.06, 0.035),
    SILHOUETTE: (8.0, 0.60, 1.25, 0.12, 0.12, 0.045),
    MARKED: (8.0, 0.60, 1.60, 0.12, 0.15, 0.035),
}
KINDS = len(MOVES)


class Views:
    """Callable: ``(rgba [B, 4, S, S] uint8, kind [B]) -> [B, 3, S, S]`` in 0..1."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        self.moves = torch.tensor([MOVES[kind] for kind in range(KINDS)])

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * (high - low) + low

    def coin(self, probability: Tensor) -> Tensor:
        return torch.rand(probability.shape, generator=self.generator) < probability

    def __call__(self, rgba: Tensor, kind: Tensor) -> Tensor:
        picture = rgba.float() / 255
        # Interpolating straight alpha would drag the colour of invisible pixels into the edges.
        picture = torch.cat([picture[:, :3] * picture[:, 3:], picture[:, 3:]], dim=1)
        picture = F.grid_sample(picture, self._grid(kind, rgba.shape[-1]), align_corners=False)
        colour, alpha = picture[:, :3], picture[:, 3:].clamp(0, 1)
        view = torch.empty_like(colour)
        drawn = (kind == DRAWING) | (kind == FLAG)
        for part, paint in ((drawn, self._coloured), (~drawn, self._one_colour)):
            view[part] = paint(colour[part], alpha[part], kind[part])
        return self._coarsen(view, kind).clamp_(0, 1)

    def _grid(self, kind: Tensor, size: int) -> Tensor:
        count = len(kind)
        turn, small, large, shear, shift, bend = self.moves[kind].unbind(1)
        angle = self.uniform(count, low=-1, high=1) * turn * torch.pi / 180
        zoom = 1 / (small + (large - small) * self.uniform(count))
        stretch = torch.exp(self.uniform(count, low=-0.22, high=0.22))
        flippable = (kind != GLYPH) & (kind != FLAG)
        mirror = 1 - 2 * (flippable & self.coin(torch.full((count,), 0.5))).float()
        slant = self.uniform(count, low=-1, high=1) * shear
        cos, sin = torch.cos(angle), torch.sin(angle)
        move = self.uniform(2, count, low=-1, high=1) * shift * 2
        rows = [
            torch.stack([zoom * stretch * cos * mirror, zoom * (slant - sin), move[0]], 1),
            torch.stack([zoom * sin * mirror, zoom / stretch * cos, move[1]], 1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), [count, 1, size, size], align_corners=False)
        knots = torch.randn(count, 2, 5, 5, generator=self.generator) * bend[:, None, None, None]
        bent = F.interpolate(knots, size=(size, size), mode="bicubic", align_corners=True)
        return grid + bent.permute(0, 2, 3, 1)

    def _coloured(self, colour: Tensor, alpha: Tensor, kind: Tensor) -> Tensor:
        count = len(kind)
        die = self.uniform(count, 1, 1, 1)
        background = self.uniform(count, 3, 1, 1)
        background = torch.where(die < 0.65, torch.ones(()), background)
        background = torch.where(die > 0.93, torch.zeros(()), background)
        view = colour + (1 - alpha) * background
        strength = torch.where(kind == FLAG, 0.15, 0.35)[:, None, None, None]
        bright = 1 + strength * self.uniform(count, 1, 1, 1, low=-1, high=1)
        contrast = 1 + strength * self.uniform(count, 1, 1, 1, low=-1, high=1)
        saturation = 1 + strength * self.uniform(count, 1, 1, 1, low=-1.5, high=1)
        tint = 1 + 0.4 * strength * self.uniform(count, 3, 1, 1, low=-1, high=1)
        mean = view.mean((1, 2, 3), keepdim=True)
        view = (view - mean) * contrast + mean * bright
        grey = view.mean(1, keepdim=True)
        faded = self.coin(torch.where(kind == FLAG, 0.02, 0.12))[:, None, None, None]
        view = torch.where(faded, grey.expand_as(view), grey + (view - grey) * saturation)
        return view * tint

    def _one_colour(self, colour: Tensor, alpha: Tensor, kind: Tensor) -> Tensor:
        """Draw the shape in one colour on another, as letters, icons and silhouettes are."""
        count = len(kind)
        ink = self._markings(colour, alpha, kind)
        ink = self._stroke(ink, kind)
        ink = self._ornament(ink, kind)
        front, back = self.uniform(2, count, 3, 1, 1).unbind(0)
        # Push the two colours to opposite sides of grey so that the shape stays visible.
        side = self.coin(torch.full((count,), 0.5)).float()[:, None, None, None]
        front, back = front * 0.5 + 0.5 * side, back * 0.5 + 0.5 * (1 - side)
        die = self.uniform(count)
        negative = torch.tensor([0.35, 0.25, 0.0, 0.0, 0.65, 0.65])[kind]
        positive = negative + torch.tensor([0.40, 0.45, 0.0, 0.0, 0.20, 0.20])[kind]
        white_on_black = (die < negative)[:, None, None, None]
        black_on_white = ((die >= negative) & (die < positive))[:, None, None, None]
        one, nil = torch.ones(()), torch.zeros(())
        front = torch.where(white_on_black, one, torch.where(black_on_white, nil, front))
        back = torch.where(white_on_black, nil, torch.where(black_on_white, one, back))
        return ink * front + (1 - ink) * back

    def _markings(self, colour: Tensor, alpha: Tensor, kind: Tensor) -> Tensor:
        """For MARKED pictures the light (or the dark) parts of the shape, else the whole shape."""
        light = colour.mean(1, keepdim=True) / alpha.clamp_min(0.05)
        count = len(kind)
        threshold = self.uniform(count, 1, 1, 1, low=0.35, high=0.65)
        part = torch.sigmoid((light - threshold) * 14)
        dark = self.coin(torch.full((count,), 0.35))[:, None, None, None]
        part = torch.where(dark, 1 - part, part)
        return torch.where((kind == MARKED)[:, None, None, None], alpha * part, alpha)

    def _stroke(self, ink: Tensor, kind: Tensor) -> Tensor:
        """Thicken or thin by up to two pixels."""
        thick = F.max_pool2d(ink, 3, 1, 1)
        thin = -F.max_pool2d(-ink, 3, 1, 1)
        amount = self.uniform(len(kind), 1, 1, 1, low=-0.9, high=1.6)
        # Thin strokes must not vanish: thin only where enough ink is left.
        enough = thin.mean((1, 2, 3), keepdim=True) > 0.4 * ink.mean((1, 2, 3), keepdim=True)
        amount = torch.where(enough, amount, amount.clamp_min(0))
        thicker = thick + (F.max_pool2d(thick, 3, 1, 1) - thick) * (amount - 1).clamp(0, 1)
        changed = torch.where(
            amount > 0,
            ink + (thicker - ink) * amount.clamp(0, 1),
            ink + (ink - thin) * amount,
        )
        use = self.coin(torch.full((len(kind),), 0.5)) & (kind != MARKED)
        return torch.where(use[:, None, None, None], changed, ink).clamp(0, 1)

    def _ornament(self, ink: Tensor, kind: Tensor) -> Tensor:
        """Outlines, gaps and coarse pixels for some glyphs: decorative type has them all."""
        size = ink.shape[-1]
        die = torch.where(kind == GLYPH, self.uniform(len(kind)), torch.ones(()))
        ink = ink.clone()
        forms = (self._outline, self._worn, self._striped, self._pixels, self._shadow)
        for form, low, high in zip(
            forms, (0, 0.08, 0.16, 0.22, 0.30), (0.08, 0.16, 0.22, 0.30, 0.36), strict=True
        ):
            part = (die >= low) & (die < high)
            if part.any():
                ink[part] = form(ink[part], size)
        return ink

    def _outline(self, ink: Tensor, size: int) -> Tensor:
        return F.max_pool2d(ink, 5, 1, 2) - ink

    def _worn(self, ink: Tensor, size: int) -> Tensor:
        patches = self.uniform(len(ink), 1, 9, 9)
        patches = F.interpolate(patches, size=(size, size), mode="bilinear", align_corners=False)
        return ink * ((patches - 0.28) * 12).clamp(0, 1)

    def _striped(self, ink: Tensor, size: int) -> Tensor:
        stripes = ((torch.arange(size)[:, None] // 2) % 2).float().expand(size, size)
        lying = self.coin(torch.full((len(ink), 1, 1, 1), 0.5))
        return ink * (1 - 0.8 * torch.where(lying, stripes, stripes.T))

    def _pixels(self, ink: Tensor, size: int) -> Tensor:
        coarse = F.interpolate(F.adaptive_avg_pool2d(ink, 16), size=(size, size), mode="nearest")
        return ((coarse - 0.4) * 8).clamp(0, 1)

    def _shadow(self, ink: Tensor, size: int) -> Tensor:
        return (torch.roll(ink, (4, 4), (2, 3)) * 0.5).maximum(ink)

    def _coarsen(self, view: Tensor, kind: Tensor) -> Tensor:
        """Some views pass through 28 pixels, the size of two of the tasks' originals."""
        count, size = len(kind), view.shape[-1]
        share = torch.tensor([0.4, 0.25, 0.1, 0.1, 0.75, 0.75])[kind]
        part = self.coin(share)
        small = F.interpolate(view[part], size=(28, 28), mode="area")
        view[part] = F.interpolate(small, size=(size, size), mode="bicubic", align_corners=False)
        part = self.coin(torch.full((count,), 0.15))
        view[part] = F.avg_pool2d(F.pad(view[part], (1, 1, 1, 1), mode="replicate"), 3, 1)
        part = self.coin(torch.full((count,), 0.2))
        noise = torch.randn(view[part].shape, generator=self.generator)
        view[part] += noise * self.uniform(len(noise), 1, 1, 1, high=0.05)
        return view
