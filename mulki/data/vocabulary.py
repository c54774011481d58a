"""Vocabularies: words that some methods use as text anchors, without any image of them."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mulki.errors import InputError
from mulki.files import check_regular

TEMPLATE = "a picture of a {}"


@dataclass(frozen=True)
class Vocabulary:
    """Words or phrases, no two alike.

    Args:
        words: in the order of their source.
        repeated: words of the source that were left out because they came before, see `key_of`.
    """

    words: tuple[str, ...]
    repeated: int = 0

    @classmethod
    def of(cls, words: Iterable[str]) -> Vocabulary:
        """The vocabulary of words that may be repeated or blank."""
        given = [stripped for word in words if (stripped := word.strip())]
        kept: dict[str, str] = {}
        for word in given:
            kept.setdefault(key_of(word), word)
        return cls(tuple(kept.values()), len(given) - len(kept))

    def fingerprint(self) -> str:
        """Hex SHA-256 of the words."""
        return hashlib.sha256(json.dumps(self.words).encode()).hexdigest()


def key_of(word: str) -> str:
    """What words have in common that differ in capitals, spaces, underscores or Unicode form only.

    The forms are those of letters with accents, one character or two.
    """
    return unicodedata.normalize("NFC", " ".join(word.replace("_", " ").split()).casefold())


def imagenet_vocabulary() -> Vocabulary:
    """The class names of ImageNet-1k as torchvision ships them."""
    from torchvision.models import ResNet18_Weights

    return Vocabulary.of(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """Read a text file with a word or phrase in each line; blank lines are passed over.

    Raises:
        InputError: no such file, not UTF-8 text, or no word in it.
    """
    path = Path(path)
    check_regular(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--vocabulary: {path} cannot be read ({error.strerror}); pass a text file with a word "
            "in each line"
        ) from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"--vocabulary: {path}, line {line}: not UTF-8 text; save the file as UTF-8"
        ) from None
    vocabulary = Vocabulary.of(text.splitlines())
    if not vocabulary.words:
        raise InputError(f"--vocabulary: {path} holds no word; write one in each line")
    return vocabulary
