"""Pictures, shards and splits for the tests of the data layer."""

from __future__ import annotations

import hashlib
import io
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, size: int = 16) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write_shard(path: Path, items: list[tuple[bytes, int]]) -> dict[str, object]:
    files = {}
    for i, (image, target) in enumerate(items):
        files |= {f"{i:06d}.webp": image, f"{i:06d}.cls": str(target).encode()}
        files[f"{i:06d}.json"] = b"{}"
    write_tar(path, files)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"file": path.name, "count": len(items), "sha256": digest}


@dataclass(frozen=True)
class Blank:
    """A split of blank images."""

    targets: tuple[int, ...]
    size: int | None = None
    key: str = "k"

    def __len__(self) -> int:
        return len(self.targets) if self.size is None else self.size

    def load(self, index: int) -> Image.Image:
        return Image.new("RGB", (4, 4))

    def name(self, index: int) -> str:
        return str(index)

    def fingerprint(self) -> str:
        return self.key
