from __future__ import annotations

import pytest

from mulki.choices.option_files import options_in


def test_a_mapping_of_names() -> None:
    assert options_in("lr: 1.0e-4\nbatch-size: 8\n") == {"lr": 1e-4, "batch-size": 8}
    assert options_in("# none\n") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: 2026-02-30", "day is out of range"),
        ("lr: 1\nseed: " + "9" * 6000, "line 2: a number of 6000 characters"),
        ("seed: 0x" + "f" * 6000, "line 1: a number of 6002 characters"),
        ("tasks: " + "[" * 20_000, "nested too deeply"),
        ("a: &x [1]\nb: *x", r"line 2: the alias \*x"),
        ("tasks: &x [*x]", r"line 1: the alias \*x"),
        ("batch-size: 8\nbatch_size: 9", "line 2: the option batch_size is given twice"),
        ("seed: !!int ''", "index out of range"),
        ("- a", "no mapping"),
        ("3: 4", "no mapping"),
        ("a: !!python/object:os.system x", "could not determine a constructor"),
        ("a: [1", "expected ',' or ']'"),
    ],
)
def test_what_is_refused_is_named_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        options_in(text)
    assert len(str(caught.value).splitlines()) == 1
