from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mulki.data import Task, load_sequence, register_sequence, sequence_names, sequences
from mulki.data.embedded import embedded_sequence
from mulki.data.sequences import has_orders
from mulki.errors import InputError
from tests import python

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def zoo(pack: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A second registered sequence, "zoo", with the tasks digits and letters."""
    monkeypatch.setattr(sequences, "_SEQUENCES", dict(sequences._SEQUENCES))

    @register_sequence("zoo")
    def load(order: str) -> list[Task]:
        return embedded_sequence(order, pack)

    yield


def _refused(spec: list[str], *words: object, order: str = "I") -> None:
    with pytest.raises(InputError) as caught:
        load_sequence(spec, order)
    assert all(str(word) in str(caught.value) for word in words), str(caught.value)


def _names(tasks: list[Task]) -> list[str]:
    return [task.name for task in tasks]


def test_names_are_sorted_and_hold_the_bundled_pack() -> None:
    bundled = ("embedded", "embedded-flags", "embedded-glyphs")
    assert sequence_names() == ("cil", *bundled, "mtil", "xtail", "zoo")


def test_a_registered_sequence_in_its_orders() -> None:
    assert _names(load_sequence(["zoo"], "I")) == ["digits", "letters"]
    assert _names(load_sequence("zoo", "II")) == ["letters", "digits"]
    _refused(["zoo"], '"III"', "I, II", order="III")


def test_folders_and_single_tasks_have_no_orders() -> None:
    assert has_orders(["zoo"]) and has_orders(("mtil",), "II")
    for spec in (["zoo:digits"], ["birds/"], ["birds/", "zoo:digits"], ["cil"], []):
        assert not has_orders(spec)
    # A report may be written where the sequence is not registered.
    assert has_orders(["gone"], "II")


def test_names_are_taken_once_and_hold_no_colon() -> None:
    def again(order: str) -> list[Task]:
        raise AssertionError("not called")

    with pytest.raises(InputError) as caught:
        register_sequence("zoo")(again)
    assert str(caught.value).count("test_sequences.py, line ") == 2
    assert '"zoo"' in str(caught.value) and "rename" in str(caught.value)
    with pytest.raises(InputError, match="colon"):
        register_sequence("a:b")
    with pytest.raises(InputError, match="got the name ''"):
        register_sequence("")(again)


@pytest.mark.parametrize(
    ("returned", "came"),
    [(None, "NoneType"), ([], "an empty list"), (["birds"], "list of str"), ("birds", "str")],
)
def test_a_sequence_has_to_return_tasks(returned: object, came: str) -> None:
    register_sequence("lost")(lambda order: returned)  # type: ignore[arg-type, return-value]
    for word in ("lost", "lost:birds"):
        _refused([word], 'task sequence "lost"', "test_sequences.py, line ", f"returned {came}, ")


def test_folders_in_the_order_given(make_folder: Make) -> None:
    birds, apes = make_folder("birds"), make_folder("apes")
    assert _names(load_sequence([str(birds), str(apes)])) == ["birds", "apes"]


def test_single_tasks_of_a_sequence_mix_with_folders(make_folder: Make) -> None:
    spec = ["zoo:letters", str(make_folder("birds")), "zoo:digits"]
    assert _names(load_sequence(spec)) == ["letters", "birds", "digits"]
    assert _names(load_sequence(["zoo:letters"])) == ["letters"]


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        (["zoo:leters"], ["zoo:leters", 'did you mean "letters"', "digits, letters"]),
        (["embeded"], ["embeded", 'did you mean "embedded"', "nor an existing folder", "zoo"]),
        (["some/where"], ["some/where"]),
        ([], ["no tasks given", "embedded"]),
    ],
)
def test_words_that_name_no_task(spec: list[str], words: list[str]) -> None:
    _refused(spec, *words)


def test_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.zip").write_text("")
    _refused([str(tmp_path / "x.zip")], tmp_path / "x.zip", "a file", "train/")


def test_orders_belong_to_sequences(make_folder: Make) -> None:
    _refused([str(make_folder())], '"II"', "named sequence", "embedded", order="II")


def test_whole_sequence_stands_alone(make_folder: Make) -> None:
    folder = str(make_folder())
    for spec in ([folder, "zoo"], ["zoo", folder]):
        _refused(spec, "zoo", "stands alone", "zoo:NAME", "./zoo")


def test_two_tasks_of_one_name(make_folder: Make) -> None:
    one, two = make_folder("a/birds"), make_folder("b/birds")
    _refused([str(one), str(two)], one, two, '"birds"', "rename")


def test_name_goes_before_a_folder_and_a_dot_reaches_the_folder(
    make_folder: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(make_folder("zoo").parent)
    assert _names(load_sequence(["zoo"])) == ["digits", "letters"]
    assert _names(load_sequence(["./zoo"])) == ["zoo"]


def test_skipping_reaches_folders(make_folder: Make) -> None:
    root = make_folder()
    (root / "train" / "crow" / "0.png").write_bytes(b"")
    _refused([str(root)], "0.png", "--skip-bad-images")
    (task,) = load_sequence([str(root)], skip_bad_images=True)
    assert task.skipped == (str(root / "train" / "crow" / "0.png"),)


def test_importing_the_data_layer_imports_neither_torch_nor_torchvision() -> None:
    # As plain modules, since the package's own face needs torch.
    code = (
        "import sys, types; sys.modules['mulki'] = m = types.ModuleType('mulki'); "
        "m.__path__ = sys.argv[1:]; import mulki.data, mulki.data.transforms; "
        "print(sorted({'torch', 'torchvision', 'open_clip'} & set(sys.modules)))"
    )
    package = str(Path(sequences.__file__).parents[1])
    assert python("-c", code, package).strip() == "[]"


def test_captions_are_no_name_of_a_sequence() -> None:
    with pytest.raises(InputError, match="captions:PATH"):
        register_sequence("captions")


def test_a_share_reaches_the_tasks_that_lack_a_split(make_folder: Make) -> None:
    root, other = make_folder("birds"), make_folder("apes")
    for name in ("crow", "blue_jay"):
        (root / "train" / name).rename(root / name)
    shutil.rmtree(root / "train")
    shutil.rmtree(root / "test")
    lines = [f"{path.relative_to(root)},{path.parent.name}" for path in root.rglob("*.png")]
    (root / "rows.csv").write_text("path,label\n" + "\n".join(lines) + "\n")
    lines = [f"{path.relative_to(root)},no {place}" for place, path in enumerate(root.rglob("*"))]
    lines = [line for line in lines if ".png" in line]
    (root / "texts.csv").write_text("path,caption\n" + "\n".join(lines) + "\n")
    words = [str(root), str(root / "rows.csv"), f"captions:{root}/texts.csv", str(other)]
    tasks = load_sequence([*words, "zoo:digits"], test_fraction=0.4)
    assert [task.test_fraction for task in tasks] == [0.4, 0.4, 0.4, None, None]
    assert [len(task.test) for task in tasks] == [2, 2, 2, 6, 3]
    for word in words[:3]:
        _refused([word], "pass --test-fraction 0.2")


@pytest.mark.parametrize("words", [["apes"], ["zoo"], ["zoo:digits", "apes"], ["mtil:dtd"]])
def test_a_share_has_no_effect_where_all_have_a_split(
    make_folder: Make, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.chdir(make_folder("apes").parent)
    with pytest.raises(InputError) as caught:
        load_sequence(words, test_fraction=0.25)
    assert str(caught.value) == (
        "--test-fraction 0.25: about tasks without a split, but all tasks here have one, so this "
        "changes nothing; leave it out"
    )
