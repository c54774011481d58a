"""Captioned pictures for the start model: the tasks' ideas in other hands' drawings.

    python -m benchmarks.embedded.pack.training_pictures --cache CACHE --pack mulki/data/embedded \\
        --out PAIRS

No picture comes from a package that a task is drawn from: letters and digits are set in plain and
handwriting fonts, emoji and flags are other vendors', animals are stamps, flash cards and icons. A
picture that is a near duplicate of one in the pack all the same, mirrored or not, is left out.
Stamps and cards are in part Openclipart's drawings: those of the pack that were recognised among
them are left out of the pack (``shared_drawings.txt``). Written are
``images.npy`` ``[N, 64, 64, 4]`` uint8 RGBA and ``pairs.json``: per picture its source, its kind
(which decides how it is augmented) and its captions, each with the idea it stands for.
"""

from __future__ import annotations

import argparse
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont
from scipy import ndimage

from benchmarks.embedded.pack import render
from benchmarks.embedded.pack.captions import animal_of, captions, plain_words
from benchmarks.embedded.pack.similar import NEAR, NEAR_SHAPE, mirrored, near_pairs, thumbnails
from benchmarks.embedded.pack.sources import PAIR_FONTS, Cache
from benchmarks.embedded.pack.tasks import EMOJI_GROUPS, country_names, flag_code
from mulki.data.shards import open_pack

# Kinds of picture; the trainer augments each in its own way.
GLYPH, ICON, DRAWING, FLAG, SILHOUETTE, MARKED = range(6)


@dataclass
class Pair:
    """``captions`` are ``(text, idea)``; rows of a batch whose ideas agree are not negatives."""

    image: np.ndarray  # [64, 64, 4] uint8
    source: str
    kind: int
    captions: list[tuple[str, str]] = field(default_factory=list)


DIGIT_NAMES = "zero one two three four five six seven eight nine".split()
HANDWRITING = re.compile(
    r"hand|breip|bwht|femke|humor|kristi|klee|rufscript|seto|ottilie|havana|comic|purisa|yozvox|"
    r"dancing|kaushan|tomson|summersby|ecolier|cherry|dustin|compagnon|lobster|leckerli"
)


def glyphs(cache: Cache) -> Iterator[Pair]:
    """Capitals, small letters and digits; at most a dozen faces of one package."""
    for name in PAIR_FONTS:
        if name in {"symbola", "dseg"}:
            continue
        folder = cache.debian(f"fonts-{name}") / "usr/share"
        paths = [
            path
            for path in sorted(folder.rglob("*"))
            if path.suffix.lower() in {".ttf", ".otf", ".t1"} and not path.is_symlink()
        ]
        limit = 24 if HANDWRITING.search(name) else 8
        step = max(1, len(paths) // limit)
        for path in paths[::step][:limit]:
            yield from _face(path, bool(HANDWRITING.search(name)))


def _face(path: Path, handwriting: bool) -> Iterator[Pair]:
    try:
        known = TTFont(path, lazy=True).getBestCmap() or {} if path.suffix != ".t1" else None
        font = ImageFont.truetype(str(path), 96)
    except Exception:  # a damaged or bitmap-only face is no loss, whatever the library calls it
        return
    for character in "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789":
        if known is not None and ord(character) not in known:
            continue
        image = render.glyph(font, character)
        if image is None:
            continue
        if character.isdigit():
            word = DIGIT_NAMES[int(character)]
            texts = [
                f"the digit {word}", f"the number {word}", f"a handwritten digit {word}",
                f"the handwritten number {word}", f"a picture of the digit {word}", word,
                f"the digit {character}",
            ]  # fmt: skip
            source = "digits by hand" if handwriting else "digits"
            yield Pair(image, source, GLYPH, [(text, f"digit {word}") for text in texts])
        else:
            texts = [
                f"the letter {character}", f"a decorative letter {character}",
                f"the capital letter {character} in black on white",
                f"a capital letter {character}",
                f"an uppercase {character}", f"the letter {character} of the alphabet",
            ]  # fmt: skip
            source = "letters by hand" if handwriting else "letters"
            yield Pair(image, source, GLYPH, [(text, f"letter {character}") for text in texts])


def _solid(image: np.ndarray) -> np.ndarray:
    """The picture's outline, holes filled, in black: line art becomes a silhouette."""
    mask = ndimage.binary_fill_holes(image[..., 3] > 100)
    alpha = np.maximum(np.where(mask, 255, 0), image[..., 3]).astype(np.uint8)
    black = np.zeros_like(image)
    black[..., 3] = alpha
    return black


def _group(categories: Iterable[str]) -> str | None:
    """The emoji task's class of a picture of these groups of Unicode."""
    return next((EMOJI_GROUPS[c] for c in categories if c in EMOJI_GROUPS), None)


def with_silhouettes(pair: Pair, name: str) -> Iterator[Pair]:
    """The picture; of the ten animals also the filled shape, of a zebra the markings."""
    yield pair
    animal = animal_of(name)
    if animal is None:
        return
    texts = [
        (f"a silhouette of a {animal}", animal), (f"the white shape of a {animal}", animal),
        (f"a black and white picture of a {animal}", animal), (f"the shape of a {animal}", animal),
        (animal, animal),
    ]  # fmt: skip
    # The emoji called plainly "bear" is a face in every style.
    head = name == "bear" or bool(re.search(r"\b(face|head)\b", name))
    source = f"animal {animal} head" if head else f"animal {animal}"
    if animal == "zebra":
        # Without its stripes it is a horse.
        if pair.kind == DRAWING:
            yield Pair(pair.image, source, MARKED, texts)
        return
    solid = _solid(pair.image)
    rows, columns = np.nonzero(solid[..., 3] > 100)
    box = (np.ptp(rows) + 1) * (np.ptp(columns) + 1)
    # A disc or a plate is the background of an icon, not the animal on it.
    if head or len(rows) < 0.77 * box:
        yield Pair(solid, source, SILHOUETTE, texts)


def _named(
    cache_folder: Path, source: str, kind: int, phrase: str, emoji: bool, skip: re.Pattern | None
):
    """Pairs of one iconify package; the drawings are rendered in a pool."""
    icons = []
    for icon in render.iconify(cache_folder):
        if skip and skip.search(icon.name):
            continue
        if emoji and ("skin-tone" in icon.name or icon.name.startswith("flag-")):
            continue
        icons.append(icon)
    with ProcessPoolExecutor() as pool:
        images = list(pool.map(render.svg, [icon.markup for icon in icons], chunksize=64))
    for icon, image in zip(icons, images, strict=True):
        if image is None or (image[..., 3] > 30).mean() < 0.02:
            continue
        name = plain_words(icon.name)
        texts = captions(name, phrase, _group(icon.categories) if emoji else None)
        yield from with_silhouettes(Pair(image, source, kind, texts), name)


# Fluent marks skin tones without saying so.
TONES = re.compile(r"-(dark|light|medium|medium-dark|medium-light)$")
EMOJI_PACKAGES = {
    "openmoji@1.2.29": re.compile(r"-low$"),
    "twemoji@1.2.5": None,
    "fluent-emoji-flat@1.2.6": TONES,
    "fluent-emoji@1.2.7": TONES,
    "fluent-emoji-high-contrast@1.2.6": TONES,
    "streamline-emojis@1.2.4": None,
}
VARIANTS = re.compile(
    r"-(outline|off|negative|line|thin|light|bold|duotone|linear|broken|alert|plus|minus|remove|edit|"
    r"check|cancel|arrow-\w+|cog|lock|search|sync|settings)\b|^(alpha|numeric|format|arrow|account|"
    r"border|align|brand|currency|circle|square|file|folder|database|layout|microsoft|google)-|sharp|"
    r"^letter-|^number-|^\d"
)
ICON_PACKAGES = {
    "game-icons@1.2.4": None,
    "fa6-solid@1.2.4": re.compile(r"^[a-z0-9]$|^(arrow|angle|chevron|caret)s?-"),
    "ph@1.2.2": re.compile(r"^(?!.*-fill$)|arrow|letter-|number-|text-"),
    "temaki@1.2.6": None,
    "maki@1.2.5": re.compile(r"-\d+$"),
    "healthicons@1.2.13": VARIANTS,
    "icon-park-solid@1.2.4": VARIANTS,
    "mdi@1.2.3": VARIANTS,
    "material-symbols@1.2.98": re.compile(VARIANTS.pattern + r"|rounded|^(?!.*-outline)$^"),
    "mingcute@1.2.8": re.compile(r"^(?!.*-fill$)|arrow"),
    "tabler@1.2.41": re.compile(
        r"^(?!.*-filled$)|arrow|circle|square|hexagon|layout|letter|number"
    ),
}
COLOR_PACKAGES = {
    "streamline-kameleon-color@1.2.2": re.compile("^(?!.*-duo$)"),
    "streamline-freehand-color@1.2.2": None,
    "streamline-ultimate-color@1.2.2": None,
    "streamline-plump-color@1.2.2": re.compile("^(?!.*-flat$)"),
    "streamline-stickies-color@1.2.2": None,
    "flat-color-icons@1.2.3": None,
    "icon-park@1.2.4": VARIANTS,
}
TRAILING = re.compile(
    r"( (fill|filled|duo|flat|color|\d+|alt|variant|side|outline|solid|rounded))+$"
)


def emoji_pairs(cache: Cache) -> Iterator[Pair]:
    for package, skip in EMOJI_PACKAGES.items():
        name = package.split("@")[0]
        kind = ICON if "contrast" in name else DRAWING
        yield from _named(cache.npm(package), f"emoji {name}", kind, "an emoji", True, skip)
    # fxemoji writes its names without hyphens; they are usable where they are known elsewhere.
    spaced: dict[str, tuple[str, tuple[str, ...]]] = {}
    for icon in render.iconify(cache.npm("twemoji@1.2.5")):
        spaced[icon.name.replace("-", "")] = (icon.name, icon.categories)
        spaced[icon.name.replace("-", "").removesuffix("face")] = (icon.name, icon.categories)
    for icon in render.iconify(cache.npm("fxemoji@1.2.2")):
        name, categories = spaced.get(icon.name.replace("-", ""), (None, ()))
        image = render.svg(icon.markup) if name and not name.startswith("flag-") else None
        if image is not None:
            name = plain_words(name)
            texts = captions(name, "an emoji", _group(categories))
            yield from with_silhouettes(Pair(image, "emoji fxemoji", DRAWING, texts), name)


def symbola_pairs(cache: Cache) -> Iterator[Pair]:
    """Symbola's monochrome pictures, named by Unicode, with the groups of the same code points."""
    path = next((cache.debian("fonts-symbola") / "usr/share/fonts").rglob("Symbola*.ttf"))
    font = ImageFont.truetype(str(path), 96)
    package = cache.npm("twemoji@1.2.5")
    by_code = json.loads((package / "chars.json").read_text(encoding="utf-8"))
    groups = {icon.name: icon.categories for icon in render.iconify(package)}
    for code in sorted(TTFont(path, lazy=True).getBestCmap()):
        if not (0x1F300 <= code < 0x1F700 or 0x2600 <= code < 0x27C0):
            continue
        name = unicodedata.name(chr(code), "").lower()
        image = render.glyph(font, chr(code), margin=0.05) if name else None
        if image is None:
            continue
        texts = captions(name, "a drawing", _group(groups.get(by_code.get(f"{code:x}", ""), ())))
        yield from with_silhouettes(Pair(image, "emoji symbola", ICON, texts), name)


def icon_pairs(cache: Cache) -> Iterator[Pair]:
    for packages, kind in ((ICON_PACKAGES, ICON), (COLOR_PACKAGES, DRAWING)):
        for package, skip in packages.items():
            source = ("icons " if kind == ICON else "drawings ") + package.split("@")[0]
            phrase = "an icon" if kind == ICON else "a drawing"
            for pair in _named(cache.npm(package), source, kind, phrase, False, skip):
                if pair.kind not in (SILHOUETTE, MARKED):
                    name = TRAILING.sub("", pair.captions[0][0])
                    pair.captions = captions(name, phrase)
                yield pair


def flag_pairs(cache: Cache) -> Iterator[Pair]:
    """Round, outlined and rounded-corner flags."""
    names = country_names(cache)

    def pair(code: str, markup: str, source: str) -> Iterator[Pair]:
        image = render.svg(markup) if code in names else None
        if image is not None:
            country = names[code]
            texts = [
                f"the flag of {country}",
                f"a picture of the flag of {country}",
                f"{country} flag",
                country,
            ]
            yield Pair(image, source, FLAG, [(text, f"flag {country}") for text in texts])

    for package in ("circle-flags@1.2.11", "cif@1.2.7"):
        for icon in render.iconify(cache.npm(package)):
            yield from pair(icon.name, icon.markup, f"flags {package.split('@')[0]}")
    for package in ("twemoji@1.2.5", "openmoji@1.2.29"):
        folder = cache.npm(package)
        table = json.loads((folder / "chars.json").read_text(encoding="utf-8"))
        codes = {name: code for points, name in table.items() if (code := flag_code(points))}
        for icon in render.iconify(folder):
            if icon.name in codes:
                yield from pair(codes[icon.name], icon.markup, f"flags {package.split('@')[0]}")


def _photo(path: Path, white_is_empty: bool) -> np.ndarray | None:
    """A stored picture; where it has no alpha, the white around the object becomes transparent."""
    try:
        image = Image.open(path)
        image.thumbnail((256, 256))
        image = image.convert("RGBA")
    except OSError:
        return None
    if white_is_empty:
        pixels = np.array(image)
        white = pixels[..., :3].min(-1) > 243
        regions, _ = ndimage.label(white)
        edge = np.unique(np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]]))
        pixels[np.isin(regions, edge[edge > 0]), 3] = 0
        image = Image.fromarray(pixels)
    return render.fit(image)


STAMP_FOLDERS = {
    "animals": "animal",
    "food": "food",
    "people": "person",
    "plants": "plant",
    "vehicles": "vehicle",
}


def stamp_pairs(cache: Cache) -> Iterator[Pair]:
    """Tux Paint's stamps with their English descriptions. GPL: learned from, not shipped."""
    root = cache.debian("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    for path in sorted(root.rglob("*")):
        text = path.with_suffix(".txt")
        if (
            path.suffix not in {".png", ".svg"}
            or not text.exists()
            or "alphabet" in path.as_posix()
        ):
            continue
        if re.search(r"_(mirror|flip)\.", path.name):
            continue
        line = text.read_text(encoding="utf-8", errors="replace").splitlines()[0]
        name = re.sub(r"^(an?|the) ", "", line.strip().rstrip(".!").lower())
        image = render.svg_file(path) if path.suffix == ".svg" else _photo(path, False)
        if image is None or not name:
            continue
        category = STAMP_FOLDERS.get(path.relative_to(root).parts[0])
        texts = captions(name, "a picture", category=category)
        yield from with_silhouettes(Pair(image, "stamps", DRAWING, texts), name)


CARD_FOLDERS = {
    "animals": "animal", "food": "food", "fruit_n_veg": "food", "jobs": "person",
    "people": "person", "transport": "vehicle", "construction": None, "nature": None,
    "sport": None, "actions": None, "clothes_n_accessories": None, "body": None,
}  # fmt: skip


def card_pairs(cache: Cache) -> Iterator[Pair]:
    """pySioGame's flash cards: one object on white, named by the file."""
    root = cache.debian("pysiogame") / "usr/share/games/pysiogame/res/images/art4apps"
    for folder, category in CARD_FOLDERS.items():
        for path in sorted((root / folder).glob("*.jpg")):
            name = plain_words(path.stem)
            image = _photo(path, True)
            if image is None:
                continue
            texts = captions(name, "a picture", category=category)
            yield from with_silhouettes(Pair(image, "cards", DRAWING, texts), name)


# Lossy compression alone moves a stored picture by 3 or so, at most by 7.
NEAR_STORED = NEAR + 3


def looks(images: np.ndarray, task: str) -> np.ndarray:
    """RGBA ``[N, 64, 64, 4]`` as the task would show them: thumbnails ``[N, 768]``."""
    if task == "animals":
        shapes = [render.silhouette(alpha > 100) for alpha in images[..., 3]]
        return thumbnails(np.stack(shapes))
    if task == "digits":
        white = np.concatenate([np.full_like(images[..., :3], 255), images[..., 3:]], axis=-1)
        return thumbnails(render.flatten(white, (0, 0, 0)))
    return thumbnails(render.flatten(images))


def read_pack(folder: Path) -> dict[str, np.ndarray]:
    """All pictures of the pack by task, ``[N, 64, 64, 3]``, both sides of the split."""
    pack = open_pack(folder)
    result = {}
    for name in pack.tasks:
        task = pack.task(name)
        sides = [side.load(i) for side in (task.train, task.test) for i in range(len(side))]
        result[name] = np.stack([np.asarray(picture) for picture in sides])
    return result


def without_pack(pairs: list[Pair], pack: Path) -> list[Pair]:
    """Drop pictures that the pack has too, or nearly, mirrored or not.

    Compared are colours on white and on black, and white shapes on black; with the animals only
    the outlines, framed alike.
    """
    pictures = read_pack(pack)
    silhouettes = [render.silhouette(image[..., 0] > 100) for image in pictures.pop("animals")]
    shapes = thumbnails(np.stack(silhouettes))
    shapes = np.concatenate([shapes, mirrored(shapes)])
    known = thumbnails(np.concatenate(list(pictures.values())))
    known = np.concatenate([known, mirrored(known)])
    images = np.stack([pair.image for pair in pairs])
    glyph = np.array([pair.kind == GLYPH for pair in pairs])
    hit = np.zeros(len(pairs), bool)
    for start in range(0, len(pairs), 4096):
        part = images[start : start + 4096]
        views = [looks(part, "clipart"), looks(part, "digits")]
        views.append(thumbnails(render.flatten(part, (0, 0, 0))))
        found = [near_pairs(view, known, NEAR_STORED)[:, 0] for view in views]
        outlines = near_pairs(looks(part, "animals"), shapes, NEAR_SHAPE)[:, 0]
        found.append(outlines[~glyph[start + outlines]])
        hit[start + np.unique(np.concatenate(found))] = True
    print(f"near duplicates of pack pictures left out: {hit.sum()}", flush=True)
    return [pair for pair, bad in zip(pairs, hit, strict=True) if not bad]


def collect(cache: Cache) -> list[Pair]:
    makers = (glyphs, flag_pairs, stamp_pairs, card_pairs, symbola_pairs, emoji_pairs, icon_pairs)
    pairs: list[Pair] = []
    for make in makers:
        before = len(pairs)
        pairs += make(cache)
        print(f"{make.__name__:14} {len(pairs) - before:6} pictures", flush=True)
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cache", required=True, help="folder of fetched packages")
    parser.add_argument("--pack", required=True, type=Path, help="folder of the pack")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    options = parser.parse_args()
    pairs = without_pack(collect(Cache(options.cache)), options.pack)
    options.out.mkdir(parents=True, exist_ok=True)
    np.save(options.out / "images.npy", np.stack([pair.image for pair in pairs]))
    texts: dict[str, int] = {}
    ideas: dict[str, int] = {}
    rows = []
    for pair in pairs:
        row = [
            (texts.setdefault(text, len(texts)), ideas.setdefault(idea, len(ideas)))
            for text, idea in pair.captions
        ]
        rows.append({"source": pair.source, "kind": pair.kind, "captions": row})
    table = {"texts": list(texts), "ideas": list(ideas), "pairs": rows}
    (options.out / "pairs.json").write_text(json.dumps(table))
    print(f"{len(pairs)} pictures, {len(texts)} captions, {len(ideas)} ideas")


if __name__ == "__main__":
    main()
