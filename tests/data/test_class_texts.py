from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mulki.data import load_sequence
from mulki.data.class_order import reordered
from mulki.data.class_steps import class_steps
from mulki.data.class_texts import FILE, with_class_texts
from mulki.errors import InputError

Make = Callable[..., Path]


def test_names_and_descriptions_are_prompts(make_folder: Make) -> None:
    root = make_folder(train=("blue_jay", "crow", "owl", "wren"))
    (root / "prompts.txt").write_text("a {}.\nthe {}.\n")
    (plain,) = load_sequence([str(root)])
    rows = ["class,name,description", "crow,raven,", 'crow,,"a black bird, large"', "owl,,round"]
    (root / FILE).write_text("\n".join(rows) + "\n")
    (task,) = load_sequence([str(root)])
    assert task.prompts() == [
        ["a blue jay.", "the blue jay."],
        ["a crow.", "the crow.", "a raven.", "the raven.", "a black bird, large"],
        ["a owl.", "the owl.", "round"],
        ["a wren.", "the wren."],
    ]
    # What changes is the prompts, and not the images.
    assert task.prompts_fingerprint() != plain.prompts_fingerprint()
    assert task.splits_fingerprint() == plain.splits_fingerprint()
    order = [1, 3, 0, 2]
    assert reordered(task, order).prompts() == [task.prompts()[old] for old in order]
    first, second = class_steps(task, [2, 2])
    assert [*first.prompts(), *second.prompts()] == task.prompts()
    assert first.prompts_fingerprint() != class_steps(plain, [2, 2])[0].prompts_fingerprint()


def test_csv_files_in_one_folder_have_texts_of_their_own(make_folder: Make) -> None:
    root = make_folder(train=("crow", "owl", "oak", "elm"))

    def write(file: str, classes: tuple[str, ...], splits: tuple[str, ...], column: str) -> str:
        rows = [f"{s}/{c}/0.png,{c}" + f",{s}" * bool(column) for c in classes for s in splits]
        (root / file).write_text("\n".join([f"path,label{column}", *rows]) + "\n")
        return str(root / file)

    birds = write("birds_train.csv", ("crow", "owl"), ("train",), "")
    write("birds_test.csv", ("crow", "owl"), ("test",), "")
    trees = write("trees.csv", ("oak", "elm"), ("train", "test"), ",split")
    (root / FILE).write_text("class,name\noak,Quercus\n")
    said = "birds has no class 'oak'.*move the rows of this one to birds_class_texts.csv"
    with pytest.raises(InputError, match=said):
        load_sequence([birds, trees])
    (root / f"birds_{FILE}").write_text("class,name\ncrow,raven\n")
    first, second = load_sequence([birds, trees])
    assert first.texts == (("a photo of a raven.",), ())
    assert second.texts == ((), ("a photo of a Quercus.",))


def test_classes_that_are_not_tested_may_have_texts(make_folder: Make) -> None:
    root = make_folder(train=("crow", "owl"), test=("crow",))
    (root / FILE).write_text("class,name\nowl,strix\ncrow,raven\n")
    shutil.rmtree(root / "train")
    (task,) = load_sequence([str(root)], test_only=True)
    assert task.classes == ("crow",) and task.texts == (("a photo of a raven.",),)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("class,name\ncrov,raven\n", r"line 2: .*no class 'crov'.*\"crow\""),
        ("class,name\ncrow,crow\n", "line 2: class crow has the text 'a photo of a crow.' already"),
        ("class,name\ncrow,raven\ncrow,raven\n", "line 3: class crow has the text"),
        ("class,other\ncrow,raven\n", "has neither a column name nor description"),
        ("name\nraven\n", "no column class"),
    ],
)
def test_what_fits_no_class_is_refused(make_folder: Make, text: str, said: str) -> None:
    root = make_folder()
    (task,) = load_sequence([str(root)])
    (root / FILE).write_text(text)
    with pytest.raises(InputError, match=said):
        with_class_texts(task, root)
    with pytest.raises(InputError, match="got 1 lists of texts for 2 classes"):
        dataclasses.replace(task, texts=(("x",),))
