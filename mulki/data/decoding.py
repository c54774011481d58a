"""Decoding image files to RGB; every fault of a file raises `BadImage`."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION

from mulki.errors import InputError
from mulki.files import check_regular

SUFFIXES = frozenset(
    ".avif .bmp .gif .jfif .jpeg .jpg .pbm .pgm .png .ppm .tif .tiff .webp".split()
)


# Pillow knows forty more, some of which start other programs (PostScript) or are hardly ever tried.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 89_478_485  # where Pillow begins to warn
# Transforms enlarge the shorter side first, so that a thin image of few pixels fills the memory.
_MAX_RATIO = 1000

_max_pixels = MAX_PIXELS


def limit_pixels(count: int) -> None:
    """Refuse images of more pixels from now on, in this process.

    A small file can hold a picture that fills the memory.
    """
    global _max_pixels
    _max_pixels = count
    # Pillow has a limit of its own: it warns there, and refuses twice as much.
    Image.MAX_IMAGE_PIXELS = max(count, MAX_PIXELS)


def pixel_limit() -> int:
    """The number that `limit_pixels` was given last."""
    return _max_pixels


class BadImage(InputError):
    """An image that cannot be decoded; the message names its file or shard member."""

    @classmethod
    def at(
        cls, name: str, reason: object, remedy: str = "replace the file or remove it"
    ) -> BadImage:
        """The error for the image `name`, with what the decoder said of it."""
        said = " ".join(str(reason).split()) or type(reason).__name__
        return cls(f"{name}: unreadable image ({said}); {remedy}")


@contextlib.contextmanager
def bad_image(name: str, *remedy: str) -> Iterator[None]:
    """Whatever PIL raises in the block, from OSError to struct's, becomes a `BadImage.at`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise BadImage.at(name, error, *remedy) from error


def decode(source: Path | bytes, name: str) -> Image.Image:
    """Decode a file, or the bytes of one, to an RGB image.

    Transparent parts are composited on white; grey of 12 or 16 bits is scaled to 8; of an animation
    the first frame is taken. EXIF rotation is left alone, as torchvision and open_clip do.

    Args:
        source: path or encoded bytes.
        name: what an error calls the image.

    Raises:
        BadImage: missing, truncated, too large or not an image.
    """
    with bad_image(name), _opened(source) as image:
        image.load()
        return to_rgb(image)


def verify(source: Path | bytes, name: str) -> None:
    """Check an image, decoding its pixels only where nothing cheaper shows truncation.

    Args:
        source, name: as of `decode`.

    Raises:
        BadImage: missing, truncated or not an image.
    """
    with bad_image(name):
        with _opened(source) as image:
            kind = image.format
            if kind == "PNG":  # checksums cover every chunk
                image.verify()
                return
        if kind == "JPEG" and _end_of(source) == b"\xff\xd9":
            return
    decode(source, name)


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[Image.Image]:
    if isinstance(source, Path):
        check_regular(source)
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with Image.open(file, formats=FORMATS) as image:
        width, height = image.size
        if width * height > _max_pixels:
            raise ValueError(
                f"{width} x {height} pixels are more than {_max_pixels}, see --max-pixels"
            )
        if max(width, height) > _MAX_RATIO * min(width, height):
            raise ValueError(
                f"{width} x {height} pixels: one side is more than {_MAX_RATIO} times the other; "
                "crop it"
            )
        yield image


def _end_of(source: Path | bytes) -> bytes:
    # The last two bytes.
    if isinstance(source, bytes):
        return source[-2:]
    with source.open("rb") as file:
        file.seek(-2, os.SEEK_END)
        return file.read()


def to_rgb(image: Image.Image) -> Image.Image:
    """Transparent parts on white, grey of 12 or 16 bits scaled to 8.

    Raises:
        ValueError: 32-bit pixels.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        # PIL would clip at 255, which turns most 16-bit pictures white.
        tags = getattr(image, "tag_v2", {})  # of a TIFF, whose pixels PIL leaves as they are
        grey = (np.asarray(image) >> tags.get(BITSPERSAMPLE, (16,))[0] - 8).astype(np.uint8)
        if tags.get(PHOTOMETRIC_INTERPRETATION) == 0:  # white is zero
            grey = 255 - grey
        return Image.fromarray(grey).convert("RGB")
    if image.mode in ("I", "F"):
        raise ValueError("32-bit pixels have no agreed range; convert it to 8 bits a channel")
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
    return image.convert("RGB")
