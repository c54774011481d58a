"""Turn vector drawings, font glyphs and stored images into small square RGBA arrays.

All pictures of this folder are ``uint8`` arrays of shape ``[S, S, 4]`` with straight alpha until
they are laid on a background; ``S`` is 64 unless said otherwise.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageDraw, ImageFont

SIZE = 64


def fit(image: Image.Image, size: int = SIZE, margin: float = 0.05) -> np.ndarray | None:
    """Crop to the visible part and centre it, aspect ratio kept, in a transparent square.

    Returns ``[size, size, 4]``, or None where nothing is visible.
    """
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda alpha: 255 * (alpha > 8)).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    inner = size * (1 - 2 * margin)
    factor = inner / max(image.size)
    shape = tuple(max(1, round(side * factor)) for side in image.size)
    image = image.resize(shape, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size))
    canvas.paste(image, ((size - shape[0]) // 2, (size - shape[1]) // 2))
    return np.asarray(canvas)


def svg(text: str, render_width: int = 160) -> np.ndarray | None:
    """Render SVG markup; None where it cannot be parsed or shows nothing."""
    try:
        # Without a dpi resvg refuses sizes in mm, cm and pt, which is half of Openclipart.
        png = resvg_py.svg_to_bytes(
            svg_string=text, width=render_width, dpi=96.0, skip_system_fonts=True
        )
        image = Image.open(io.BytesIO(bytes(png)))
    except (ValueError, OSError):
        return None
    # A tall page with a wide width would be cropped to a sliver; such files are drawings of pages.
    if max(image.size) > 12 * min(image.size):
        return None
    return fit(image)


def svg_file(path: Path) -> np.ndarray | None:
    try:
        # Drawings of files often cover a small part of a page, hence the larger canvas.
        return svg(path.read_text(encoding="utf-8", errors="replace"), render_width=400)
    except OSError:
        return None


def glyph(font: ImageFont.FreeTypeFont, text: str, margin: float = 0.08):
    """Draw ``text`` in black; None where the glyph is blank."""
    try:
        mask = font.getmask(text, mode="L")
    except (OSError, ValueError):
        return None
    if not mask.size[0] or not mask.size[1] or mask.size[0] > 900:
        return None
    alpha = Image.frombytes("L", mask.size, bytes(mask))
    image = Image.new("RGBA", mask.size)
    image.putalpha(alpha)
    return fit(image, SIZE, margin)


def emoji_glyph(font: ImageFont.FreeTypeFont, text: str) -> np.ndarray | None:
    """Draw one colour-bitmap emoji; None where the font composes it of several glyphs or none."""
    try:
        box = font.getbbox(text)
    except OSError:
        return None
    if box[2] - box[0] > 150 or box[2] <= box[0]:
        return None
    image = Image.new("RGBA", (160, 160))
    ImageDraw.Draw(image).text((8, 8), text, font=font, embedded_color=True)
    return fit(image)


def flatten(rgba: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)) -> np.ndarray:
    """Lay ``[..., 4]`` on one colour; returns ``[..., 3]``."""
    alpha = rgba[..., 3:].astype(np.float32) / 255
    mixed = rgba[..., :3] * alpha + np.asarray(background, np.float32) * (1 - alpha)
    return np.rint(mixed).astype(np.uint8)


def silhouette(shape: np.ndarray) -> np.ndarray:
    """White on black and cropped: ``[H, W]`` bool -> ``[32, 32, 3]``; black where empty."""
    layer = Image.new("RGBA", shape.shape[::-1], (255, 255, 255))
    layer.putalpha(Image.fromarray(np.where(shape, 255, 0).astype(np.uint8)))
    rgba = fit(layer, 32, 0.0)
    return np.zeros((32, 32, 3), np.uint8) if rgba is None else flatten(rgba, (0, 0, 0))


@dataclass(frozen=True)
class Icon:
    """One drawing of an iconify package: ``name`` is hyphenated, ``categories`` may be empty."""

    name: str
    markup: str
    categories: tuple[str, ...]


def iconify(package: Path) -> Iterator[Icon]:
    """Read the drawings of an unpacked ``@iconify-json`` package as complete SVG documents."""
    icons = json.loads((package / "icons.json").read_text(encoding="utf-8"))
    metadata_file = package / "metadata.json"
    metadata = (
        json.loads(metadata_file.read_text(encoding="utf-8")) if metadata_file.exists() else {}
    )
    categories: dict[str, list[str]] = {}
    for category, names in metadata.get("categories", {}).items():
        for name in names:
            categories.setdefault(name, []).append(category)
    for name, icon in icons["icons"].items():
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", icons.get("width", 16))
        height = icon.get("height", icons.get("height", 16))
        body = icon["body"].replace("currentColor", "#000000")
        markup = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">'
            f"{body}</svg>"
        )
        yield Icon(name, markup, tuple(categories.get(name, ())))
