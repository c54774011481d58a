from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mulki.errors import InputError
from mulki.files import temporary_for
from mulki.runs.answers import (
    Answers,
    Ranks,
    answers_path,
    read_answers,
    seen_accuracy,
    write_answers,
)
from mulki.runs.folder import RunFolder
from mulki.runs.metrics import ZERO_SHOT
from mulki.runs.results import read_evaluations

SIZES = {"a/b: ü": 7, "letters": 4}


def drawn(learned: int, seed: int = 0) -> dict[str, Answers]:
    random = np.random.default_rng([seed, learned])
    return {
        name: Answers(random.random(n) < 0.5, random.random(n) < 0.5 if i < learned else None)
        for i, (name, n) in enumerate(SIZES.items())
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    run = RunFolder.create(
        tmp_path, "first", method="mulki", order="I", seed=0, columns=tuple(SIZES), config={}
    )
    for learned, name in enumerate((ZERO_SHOT, *SIZES)):
        run.add_answers(name, drawn(learned), seconds=dict.fromkeys(SIZES, 1.0), step=learned)
    return run.path


def same(one: Answers, other: Answers) -> bool:
    return np.array_equal(one.own, other.own) and (
        (one.seen is None and other.seen is None) or np.array_equal(one.seen, other.seen)
    )


def test_answers_are_read_as_written(folder: Path) -> None:
    files = sorted(path.name for path in (folder / "answers").iterdir())
    assert files == ["00_zero-shot.npz", "01_a_b_ü.npz", "02_letters.npz"]
    found = read_answers(folder)
    assert list(found) == [ZERO_SHOT, *SIZES]
    for learned, row in enumerate(found.values()):
        wanted = drawn(learned)
        assert list(row) == list(SIZES)
        assert all(same(row[name], wanted[name]) for name in SIZES)
    with np.load(folder / "answers" / "01_a_b_ü.npz") as file:
        assert set(file.files) == {"own/a/b: ü", "own/letters", "seen/a/b: ü", "sha256"}
        arrays = {name: file[name] for name in file.files}
    # Files of earlier versions.
    np.savez(
        folder / "answers" / "01_a_b_ü.npz", **{n: a for n, a in arrays.items() if n != "sha256"}
    )
    assert list(read_answers(folder)) == [ZERO_SHOT, *SIZES]


def test_a_changed_answer_is_found_where_accuracies_stay(folder: Path) -> None:
    path = answers_path(folder, 2, "letters")
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    turned = arrays["own/a/b: ü"][::-1]
    assert not np.array_equal(turned, arrays["own/a/b: ü"])
    np.savez(path, **{**arrays, "own/a/b: ü": turned})
    with pytest.raises(
        InputError, match=r"02_letters\.npz: its content does not have its checksum"
    ):
        read_answers(folder)


def test_classes_that_were_said_are_kept_where_they_are_known(folder: Path) -> None:
    assert all(a.said is None for row in read_answers(folder).values() for a in row.values())
    kept = {
        name: Answers(each.own, each.seen, np.arange(len(each.own), dtype=np.int32))
        for name, each in drawn(2).items()
    }
    write_answers(folder, 2, "letters", kept)
    found = read_answers(folder)["letters"]
    assert all(found[n].said.tolist() == [*range(k)] for n, k in SIZES.items())  # type: ignore[union-attr]
    for bad in (np.arange(3, dtype=np.int32), np.zeros(4), np.zeros((4, 1), dtype=np.int32)):
        spoiled = {**kept, "letters": Answers(kept["letters"].own, kept["letters"].seen, bad)}
        write_answers(folder, 2, "letters", spoiled)
        with pytest.raises(InputError, match="said/letters"):
            read_answers(folder)


def test_accuracy_over_all_seen_images() -> None:
    yes, no = np.ones(3, dtype=bool), np.zeros(1, dtype=bool)
    answers = [Answers(yes, yes), Answers(no, no), Answers(no)]
    assert seen_accuracy(answers) == (75.0, 4)
    assert [a.accuracy for a in answers] == [100.0, 0.0, 0.0]


@pytest.mark.parametrize("name", [255 * "a", 85 * "花", 63 * "\U00020000"])
def test_a_file_of_a_task_with_a_long_name(tmp_path: Path, name: str) -> None:
    path = answers_path(tmp_path, 100, name)
    # A folder's name may be that long, and the temporary file's is longer than the file's.
    assert len(os.fsencode(temporary_for(path).name)) < 230
    assert path == answers_path(tmp_path, 100, name) != answers_path(tmp_path, 101, name)


def test_a_file_without_a_row_is_not_read(folder: Path) -> None:
    write_answers(folder, 3, "later", drawn(2))
    assert len(read_answers(folder)) == 3


def cut(path: Path) -> str:
    path.write_bytes(path.read_bytes()[:-30])
    return "cannot be read"


def flipped(path: Path) -> str:
    content = bytearray(path.read_bytes())
    content[90:100] = bytes(10)  # in the compressed data of the first array
    path.write_bytes(bytes(content))
    return "cannot be read"


def emptied(path: Path) -> str:
    path.write_bytes(b"")
    return "cannot be read"


def of_text(path: Path) -> str:
    path.write_text("no archive")
    return "cannot be read"


def removed(path: Path) -> str:
    path.unlink()
    return "no such file"


def of_another_run(path: Path) -> str:
    write_answers(path.parents[1], 2, "letters", drawn(2, seed=1))
    return r"% of .* right, .* in matrix\.csv"


def of_another_row(path: Path) -> str:
    path.write_bytes(answers_path(path.parents[1], 0, ZERO_SHOT).read_bytes())
    return "seen/.* is missing"


def longer(path: Path) -> str:
    answers = {n: Answers(np.tile(a.own, 2), np.tile(a.own, 2)) for n, a in drawn(2).items()}
    write_answers(path.parents[1], 2, "letters", answers)
    return "14 images of .*, 7 before"


def uneven(path: Path) -> str:
    answers = {n: Answers(a.own, a.own[1:]) for n, a in drawn(2).items()}
    write_answers(path.parents[1], 2, "letters", answers)
    return "has 6 images of 7"


def of_numbers(path: Path) -> str:
    np.savez(
        path, **{f"{kind}/{n}": np.ones(k) for kind in ("own", "seen") for n, k in SIZES.items()}
    )
    return "is float64 .*not booleans"


@pytest.mark.parametrize(
    "damage",
    [cut, flipped, emptied, of_text, removed, of_another_run, of_another_row, longer, uneven]
    + [of_numbers],
)
def test_damage_is_one_line_with_the_file(folder: Path, damage: Callable[[Path], str]) -> None:
    path = answers_path(folder, 2, "letters")
    says = damage(path)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: .*{says}.*; restore the file"):
        read_answers(folder)


def test_a_run_without_answers(folder: Path, tmp_path: Path) -> None:
    (folder / "answers").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="answers: "):
        read_answers(folder)
    with pytest.raises(InputError, match=r"matrix\.csv: "):
        read_answers(tmp_path / "gone")


RANKS = Ranks(np.array([0, 4, 7, 0], dtype=np.int32), np.array([1, 0, 5], dtype=np.int32))


def of_captions(ranks: Ranks = RANKS) -> dict[str, Answers]:
    """As `drawn`, with a second data set that has captions."""
    said = np.array([2, 0, 1, 1], dtype=np.int32)
    return {**drawn(2), "letters": Answers(ranks.images == 0, None, said, ranks)}


def test_recalls_go_by_open_clips_names() -> None:
    assert RANKS.recalls() == {
        "image_to_text_R@1": (50.0, 4),
        "image_to_text_R@5": (75.0, 4),
        "text_to_image_R@1": (pytest.approx(100 / 3), 3),
        "text_to_image_R@5": (pytest.approx(200 / 3), 3),
    }
    captions, classes = of_captions()["letters"], drawn(0)["letters"]
    assert captions.metrics() == RANKS.recalls()
    assert captions.accuracy == 50.0
    assert classes.metrics() == {"acc1": (classes.accuracy, 4)}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """A run whose first data set has classes, and whose second one captions."""
    run = RunFolder.create(
        tmp_path, "mixed", method="mulki", order="I", seed=0, columns=tuple(SIZES), config={}
    )
    for learned, name in enumerate((ZERO_SHOT, *SIZES)):
        answers = {**of_captions(), "a/b: ü": drawn(learned)["a/b: ü"]}
        run.add_answers(name, answers, seconds=dict.fromkeys(SIZES, 1.0), step=learned)
    return run.path


def test_ranks_are_read_as_written(mixed: Path) -> None:
    for row in read_answers(mixed).values():
        letters = row["letters"]
        assert row["a/b: ü"].ranks is None
        assert letters.ranks is not None and letters.seen is None and letters.said is not None
        assert letters.ranks.images.tolist() == RANKS.images.tolist()
        assert letters.ranks.texts.tolist() == RANKS.texts.tolist()
    lines = [e for e in read_evaluations(mixed / "results.jsonl") if e.after_task == "letters"]
    assert [e.metric for e in lines] == ["acc1", *RANKS.recalls(), "acc1_seen"]
    assert [e.n for e in lines[1:5]] == [4, 4, 3, 3]
    # All classes seen are those of the first data set.
    assert lines[-1].n == 7


@pytest.mark.parametrize(
    ("images", "texts", "said"),
    [
        (np.array([0, 4, 7, 1], dtype=np.int32), RANKS.texts, "own/letters"),
        (RANKS.images, RANKS.texts.astype(np.float64), "text_ranks/letters is no list of whole"),
        (RANKS.images, RANKS.texts[:0], "text_ranks/letters"),
        (RANKS.images.reshape(2, 2), RANKS.texts, "image_ranks/letters"),
    ],
)
def test_damaged_ranks(mixed: Path, images: Any, texts: Any, said: str) -> None:
    own = RANKS.images == 0
    spoiled = {**of_captions(), "letters": Answers(own, None, None, Ranks(images, texts))}
    write_answers(mixed, 2, "letters", spoiled)
    with pytest.raises(InputError, match=said):
        read_answers(mixed)


def test_one_direction_alone_is_damage(mixed: Path) -> None:
    path = answers_path(mixed, 2, "letters")
    with np.load(path) as file:
        left_out = ("text_ranks/letters", "sha256")
        arrays = {name: file[name] for name in file.files if name not in left_out}
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="image_ranks/letters and text_ranks/letters"):
        read_answers(mixed)
