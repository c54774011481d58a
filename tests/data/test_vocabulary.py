"""Vocabularies: words from ImageNet's class names and from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mulki.data.vocabulary import Vocabulary, imagenet_vocabulary, key_of, read_vocabulary
from mulki.errors import InputError


def test_words_are_kept_in_order_and_repeated_ones_counted() -> None:
    vocabulary = Vocabulary.of([" cat", "Dog", "", "CAT ", "  ", "house mouse", "dog"])
    assert vocabulary == Vocabulary(("cat", "Dog", "house mouse"), repeated=2)


def test_words_that_are_alike() -> None:
    words = ["Hot dog", "hot_dog", " hot  DOG", "caf\u00e9", "cafe\u0301", "cafe"]
    assert Vocabulary.of(words) == Vocabulary(("Hot dog", "caf\u00e9", "cafe"), 3)


def test_names_of_imagenet() -> None:
    vocabulary = imagenet_vocabulary()
    assert len(vocabulary.words) + vocabulary.repeated == 1000
    assert vocabulary.words[:2] == ("tench", "goldfish")
    assert len({key_of(word) for word in vocabulary.words}) == len(vocabulary.words)


@pytest.mark.parametrize("content", ["cat\ndog\n", "\ufeffcat\r\n\r\n  dog", "cat\ndog\ncat\n"])
def test_a_file_holds_a_word_in_each_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content.encode())
    assert read_vocabulary(path).words == ("cat", "dog")


def test_a_file_of_a_million_words(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n".join(f"word {i % 999_999}" for i in range(1_000_000)))
    vocabulary = read_vocabulary(path)
    assert (len(vocabulary.words), vocabulary.repeated) == (999_999, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no word; write one in each line"),
        (b"\n  \n", "no word"),
        ("Käse\n".encode("latin-1"), "line 1: not UTF-8 text"),
        (b"cat\ndog\n\xff\n", "line 3: "),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "words.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_vocabulary(path)
    assert str(caught.value).startswith(f"--vocabulary: {path}")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(InputError, match="^--vocabulary: "):
            read_vocabulary(path)


def test_the_fingerprint_is_that_of_the_words() -> None:
    one = Vocabulary.of(["cat", "dog"])
    assert one.fingerprint() == Vocabulary.of(["cat", "dog", "cat"]).fingerprint()
    assert one.fingerprint() != Vocabulary.of(["dog", "cat"]).fingerprint()
