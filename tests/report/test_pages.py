from __future__ import annotations

from mulki.report.pages import page_file, render


def test_a_page_escapes_text_and_holds_style_and_script() -> None:
    text = render(
        '{% extends "base.html" %}{% block body %}<p>{{ title }}</p>{% endblock %}', title="<b>&"
    )
    assert "<title>&lt;b&gt;&amp;</title>" in text and "<p>&lt;b&gt;&amp;</p>" in text
    assert page_file("style.css") in text and page_file("script.js") in text


def test_a_long_word_may_break_after_its_marks_and_stays_text() -> None:
    text = render("{% extends 'base.html' %}{% block body %}{{ x|breakable }}{% endblock %}",
                  title="t", x="a_b=<i>/c")  # fmt: skip
    assert "a_<wbr>b=<wbr>&lt;i&gt;/<wbr>c" in text
