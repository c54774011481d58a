from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mulki.data.prompts import check_templates, fill, read_templates
from mulki.errors import InputError


@given(st.text(), st.text(st.characters(exclude_characters="{}")), st.text())
def test_filling_takes_braces_in_names_as_text(name: str, before: str, after: str) -> None:
    template = before + "{}" + after.replace("{}", "")
    if template.count("{}") == 1:
        assert fill(template, name) == before + name + template[len(before) + 2 :]


def test_one_string_is_one_template() -> None:
    assert check_templates("a {}.", "x") == ("a {}.",)


def test_template_file_skips_comments_blank_lines_and_byte_order_mark(tmp_path: Any) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa {}.\r\n\r\n# not {} this\r\n  ein Bild: {}, schön \n".encode())
    assert read_templates(path) == ("a {}.", "ein Bild: {}, schön")


@pytest.mark.parametrize(
    "content, words",
    [
        (b"a {}.\n\na photo\n", ["prompts.txt line 3", '"a photo"', "exactly one {}"]),
        (b"# only this\n", ["prompts.txt", "no template"]),
        (b"caf\xe9 {}\n", ["prompts.txt", "UTF-8"]),
    ],
)
def test_bad_template_file(tmp_path: Any, content: bytes, words: list[str]) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_templates(path)
    assert all(word in str(caught.value) for word in words), str(caught.value)
