"""Published data sets on disk as their archives unpack: tiny pictures, the official names of files.

Each function writes one data set into a data root, with an image or two of every class. A picture's
colour tells its class, so a test can see whether names, labels and images belong together.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mulki.data.published import entry


def colour(target: int) -> tuple[int, int, int]:
    return (target * 7 % 256, target // 16 * 10 % 256, 128)


def jpeg(target: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour(target)).save(buffer, "JPEG")
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def aircraft(root: Path) -> None:
    data = root / "fgvc-aircraft-2013b" / "data"
    classes = entry("aircraft").classes
    put(data / "variants.txt", "".join(f"{name}\n" for name in classes))
    for split, start in (("train", 0), ("val", 1000), ("test", 2000)):
        lines = []
        for target, name in enumerate(classes):
            lines.append(f"{start + target:07d} {name}\n")
            put(data / "images" / f"{start + target:07d}.jpg", jpeg(target))
        put(data / f"images_variant_{split}.txt", "".join(lines))


def caltech101(root: Path) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    put(folder / "BACKGROUND_Google" / "image_0001.jpg", jpeg(0))
    for target in range(101):
        for number in (1, 2):
            put(folder / f"c{target:03d}" / f"image_{number:04d}.jpg", jpeg(target))


def cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    names = [name.replace(" ", "_") for name in entry("cifar100").classes]
    put(folder / "meta", pickle.dumps({"fine_label_names": names}))
    for split in ("train", "test"):
        pixels = [np.full((32, 32, 3), colour(t), np.uint8).transpose(2, 0, 1) for t in range(100)]
        data = np.stack(pixels).reshape(100, -1)
        put(folder / split, pickle.dumps({"data": data, "fine_labels": list(range(100))}))


def dtd(root: Path) -> None:
    folder = root / "dtd" / "dtd"
    for split, number in (("train", 1), ("val", 2), ("test", 3)):
        lines = []
        for target, name in enumerate(entry("dtd").classes):
            file = f"{name}/{name}_{number:04d}.jpg"
            lines.append(f"{file}\n")
            put(folder / "images" / file, jpeg(target))
        put(folder / "labels" / f"{split}1.txt", "".join(lines))


EUROSAT = (
    "AnnualCrop Forest HerbaceousVegetation Highway Industrial Pasture PermanentCrop Residential "
    "River SeaLake"
).split()


def eurosat(root: Path) -> None:
    for target, name in enumerate(EUROSAT):
        for number in range(1, 6):
            put(root / "eurosat" / "2750" / name / f"{name}_{number}.jpg", jpeg(target))


def flowers(root: Path) -> None:
    from scipy.io import savemat

    folder = root / "flowers-102"
    for number in range(1, 307):
        put(folder / "jpg" / f"image_{number:05d}.jpg", jpeg((number - 1) % 102))
    savemat(folder / "imagelabels.mat", {"labels": [[(n % 102) + 1 for n in range(306)]]})
    ids = {key: [list(range(1 + 102 * i, 103 + 102 * i))] for i, key in enumerate(FLOWER_SPLITS)}
    savemat(folder / "setid.mat", ids)


FLOWER_SPLITS = ("trnid", "valid", "tstid")


def food(root: Path) -> None:
    folder = root / "food-101"
    for split, number in (("train", 1), ("test", 2)):
        lists = {}
        for target, name in enumerate(entry("food").classes):
            key = name.replace(" ", "_")
            lists[key] = [f"{key}/{number}"]
            put(folder / "images" / key / f"{number}.jpg", jpeg(target))
        put(folder / "meta" / f"{split}.json", json.dumps(lists))


def mnist(root: Path) -> None:
    folder = root / "MNIST" / "raw"
    for split in ("train", "t10k"):
        pixels = np.stack([np.full((28, 28), 20 * t, np.uint8) for t in range(10)])
        header = struct.pack(">4i", 2051, 10, 28, 28)
        put(folder / f"{split}-images-idx3-ubyte", header + pixels.tobytes())
        put(folder / f"{split}-labels-idx1-ubyte", struct.pack(">2i", 2049, 10) + bytes(range(10)))


def oxfordpet(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for split, number in (("trainval", 1), ("test", 2)):
        lines = []
        for target, name in enumerate(entry("oxfordpet").classes):
            image = f"{name.replace(' ', '_')}_{number}"
            lines.append(f"{image} {target + 1} 1 1\n")
            put(folder / "images" / f"{image}.jpg", jpeg(target))
        put(folder / "annotations" / f"{split}.txt", "".join(lines))


def stanfordcars(root: Path) -> None:
    from scipy.io import savemat

    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    rows = [(f"{t + 1:05d}.jpg", t + 1) for t in range(196)]
    annotations = {"annotations": np.array(rows, dtype=[("fname", "O"), ("class", "O")])}
    names = np.array(entry("stanfordcars").classes, dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    savemat(folder / "devkit" / "cars_train_annos.mat", annotations)
    savemat(folder / "cars_test_annos_withlabels.mat", annotations)
    for split in ("train", "test"):
        for file, label in rows:
            put(folder / f"cars_{split}" / file, jpeg(label - 1))


def sun397(root: Path) -> None:
    folder = root / "SUN397"
    names = [name.replace(" ", "_") for name in entry("sun397").classes]
    put(folder / "ClassName.txt", "".join(f"/{name[0]}/{name}\n" for name in names))
    for target, name in enumerate(names):
        for number in (1, 2):
            put(folder / name[0] / name / f"sun_{target:03d}{number}.jpg", jpeg(target))


def tinyimagenet(root: Path) -> None:
    folder = root / "tiny-imagenet-200"
    wnids = [f"n{9000 - number:08d}" for number in range(200)]
    put(folder / "wnids.txt", "\n".join(wnids))
    lines = []
    for target, wnid in enumerate(wnids):
        put(folder / "train" / wnid / "images" / f"{wnid}_0.JPEG", jpeg(target))
        put(folder / "val" / "images" / f"val_{target}.JPEG", jpeg(target))
        lines.append(f"val_{target}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    put(folder / "val" / "val_annotations.txt", "".join(lines))


def cub(root: Path) -> None:
    folder = root / "CUB_200_2011"
    files, labels, split, classes = [], [], [], []
    for target in range(200):
        name = f"{target + 1:03d}.Long_billed_Bird_{target}"
        classes.append(f"{target + 1} {name}\n")
        for is_train in (1, 0):
            number = len(files) + 1
            files.append(f"{number} {name}/{number}.jpg\n")
            labels.append(f"{number} {target + 1}\n")
            split.append(f"{number} {is_train}\n")
            put(folder / "images" / name / f"{number}.jpg", jpeg(target))
    put(folder / "images.txt", "".join(files))
    put(folder / "image_class_labels.txt", "".join(labels))
    put(folder / "train_test_split.txt", "".join(split))
    put(folder / "classes.txt", "".join(classes))


WRITERS: dict[str, Callable[[Path], None]] = {
    each.__name__: each
    for each in (
        aircraft,
        caltech101,
        cifar100,
        cub,
        dtd,
        eurosat,
        flowers,
        food,
        mnist,
        oxfordpet,
        stanfordcars,
        sun397,
        tinyimagenet,
    )
}


def accept(root: Path, patch: pytest.MonkeyPatch) -> None:
    """Let torchvision take the files of `root`, whose checksums it knows for the real ones."""
    from torchvision import datasets

    def md5(path: Path) -> str:
        return hashlib.md5(path.read_bytes()).hexdigest()

    folder = root / "cifar-100-python"
    if folder.is_dir():
        cifar = datasets.CIFAR100
        patch.setattr(cifar, "train_list", [["train", md5(folder / "train")]])
        patch.setattr(cifar, "test_list", [["test", md5(folder / "test")]])
        patch.setattr(cifar, "meta", {**cifar.meta, "md5": md5(folder / "meta")})
    folder = root / "flowers-102"
    if folder.is_dir():
        files = dict(datasets.Flowers102._file_dict)
        for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
            files[key] = (name, md5(folder / name))
        patch.setattr(datasets.Flowers102, "_file_dict", files)
