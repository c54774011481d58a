from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mulki.report import read_contents, render_html, write_report
from mulki.runs.answers import Answers
from mulki.runs.history import add_step
from mulki.runs.metrics import DEFINITIONS, ZERO_SHOT, AccuracyMatrix, write_matrix
from tests.report.report_helpers import (
    BROWSER,
    CLASSES,
    HOSTILE,
    TASKS,
    Make,
    Page,
    check_headings,
    record,
    said_in_browser,
    write_whole_run,
)


def page_of(folder: Path) -> str:
    return render_html(read_contents(folder))


def test_the_page_holds_matrix_metrics_configuration_and_environment(folder: Path) -> None:
    text = write_report(folder).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert ["after", "letters", "digits", "a|b <i>[red]"] in page.rows
    assert [ZERO_SHOT, "7.0", "4.0", "5.0"] in page.rows
    assert ["letters", "3.0", "1.0", "2.0"] in page.rows
    assert ["digits", "6.0", "100.0", "50.0"] in page.rows
    assert ["test images", "500", "300", "400"] in page.rows
    cards = "|".join(page.cards)
    assert "Transfer|1.00|zero-shot 4.00|" in cards
    assert f"|Transfer|{DEFINITIONS['transfer']}|" in cards
    assert "BWT|3.00|zero-shot 0.00|" in cards and f"|BWT|{DEFINITIONS['bwt']}" in cards
    assert ["hashes: weights", "0123abcd"] in page.rows
    assert ["hashes: splits: digits", "4567"] in page.rows
    assert ["hashes: prompts", "-"] in page.rows
    assert '<strong class="status complete">complete</strong>' in text
    for fact in ("method mulki", "order II", "seed 4", "2 of 3 tasks learned"):
        assert f'<span class="fact">{fact}</span>' in text
    assert "a photo of a &lt;b&gt;{}&lt;/b&gt;" in text
    assert text.count('"number learned"') == 2
    assert text.count('"number kept"') == 1


def test_tasks_of_an_earlier_run_without_a_row_are_learned_too(folder: Path) -> None:
    environment = json.loads((folder / "env.json").read_text())
    environment["learned_before"] = ["letters", "a|b <i>[red]", "gone"]
    (folder / "env.json").write_text(json.dumps(environment))
    text = page_of(folder)
    assert '<span class="fact">3 of 3 tasks learned</span>' in text
    assert "in no metric: a|b &lt;i&gt;[red], of an earlier run</span>" in text


def test_the_head_line_says_what_the_run_began_with_and_when(whole: Path) -> None:
    contents = read_contents(whole)
    today = json.loads((whole / "env.json").read_text())["date"]
    text = render_html(contents)
    assert today.startswith("20") and f'<span class="fact">{today}</span>' in text
    options = {**contents.options, "pretrained": "openai", "tasks": ["embedded"]}
    text = render_html(replace(contents, options=options))
    assert '<span class="fact">pretrained openai</span>' in text
    assert '<span class="fact">order I</span>' in text
    for own in (["birds/"], ["a", "b"]):
        text = render_html(replace(contents, options={**options, "tasks": own}))
        assert '<span class="fact">order' not in text


def test_heat_follows_the_accuracy(folder: Path) -> None:
    cells = re.findall(r'style="--heat: ([\d.]+)%">([\d.]+)<', page_of(folder))
    assert len(cells) == 9 and all(heat == value for heat, value in cells)


def test_the_matrix_comes_first(whole: Path) -> None:
    headings = re.findall(r"<h2>(.*?)</h2>", page_of(whole))
    check_headings(page_of(whole))
    assert headings == [
        "Accuracy after each task",
        "Metrics",
        "Curves",
        "Accuracy by class",
        "Images gained and lost",
        "Time",
        "How it was made",
    ]


@pytest.mark.drawn
def test_the_page_needs_nothing_else(whole: Path) -> None:
    text = page_of(whole)
    page = Page(text)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "data")]
    assert links and all(link.startswith(("#", "data:image/webp;base64,")) for link in links)
    assert "default-src 'none'" in text
    plain = text.replace("data:image/webp", "")
    for external in ("http:", "https:", "@import", "<link", "url(http"):
        assert external not in plain
    assert len(text) < 3 * 2**20


@pytest.mark.drawn
def test_names_with_tags_in_them_stay_text(whole: Path) -> None:
    text = page_of(whole)
    page = Page(text)
    assert page.open == [] and page.tags.count("script") == 1
    assert "alert(1)" not in re.sub(r"&lt;script&gt;alert\(1\)", "", text)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert any(row and row[0] == CLASSES[HOSTILE][0] for row in page.rows)
    assert ["after", *TASKS, "all seen"] in page.rows


def test_classes_have_accuracies_and_their_change(whole: Path) -> None:
    contents = read_contents(whole)
    rows = Page(render_html(contents)).rows
    (row,) = (r for r in rows if r[0] == "zero" and len(r) == 6)
    right = {name: contents.answers[name]["digits"].own[::2].mean() for name in contents.answers}
    before, learned, last = (100 * right[name] for name in (ZERO_SHOT, "digits", TASKS[-1]))
    change = f"{last - before:+.1f}".replace("-", "\N{MINUS SIGN}") if last != before else "0.0"
    assert row == ["zero", "6", f"{before:.1f}", f"{learned:.1f}", f"{last:.1f}", change]


def test_a_sentence_says_what_was_learned(whole: Path) -> None:
    contents = read_contents(whole)
    matrix = AccuracyMatrix(("b", "a"), ("a", "b"), ((3.0, 80.0), (70.0, 60.04)), (40.0, 3.4))
    text = render_html(replace(contents, data=replace(contents.data, matrix=matrix)))
    said = "Learned 2 tasks: mean 21.7 → 65.0 %. a 3.4 → 60.0 (at best 80.0), b 40.0 → 70.0."
    assert f'<p class="in-words">{said}</p>' in text
    names = tuple(f"task {i}" for i in range(9))
    many = AccuracyMatrix(names, names, ((50.0,) * 9,) * 9)
    text = render_html(replace(contents, data=replace(contents.data, matrix=many)))
    assert '<p class="in-words">Learned 9 tasks: mean 50.0 %.</p>' in text


def test_what_was_lost_comes_first_and_confused_pairs_are_named(whole: Path) -> None:
    contents = read_contents(whole)
    targets = contents.data_sets["flags"].targets
    count, first = len(targets), sum(len(CLASSES[name]) for name in TASKS[:2])
    right = np.array([target == 1 for target in targets])
    # All that is on the left was said to be on the right, and before that the reverse.
    said = np.full(count, first + 1, dtype=np.int32)
    rows = {name: dict(row) for name, row in contents.answers.items()}
    rows[TASKS[-1]]["flags"] = Answers(right, None, said)
    rows[ZERO_SHOT]["flags"] = Answers(~right, None, said - 1)
    text = render_html(replace(contents, answers=rows))
    found = [row for row in Page(text).rows if row[0] in CLASSES["flags"] and len(row) == 6]
    assert [row[0] for row in found] == ["left", "right"]
    assert [row[-1] for row in found] == ["\N{MINUS SIGN}100.0", "+100.0"]
    lefts = sum(target == 0 for target in targets)
    assert f"<li>left as right ({lefts})</li>" in text


def test_images_show_what_was_said(whole: Path) -> None:
    text = page_of(whole)
    assert text.count('src="data:image/webp;base64,UklGRg=="') == 2
    assert text.count("start: zero") == 2 and "last: " not in text
    assert '<figure class="gained">' in text and '<figure class="lost">' in text
    assert text.count('alt="A test image of &lt;img src=x onerror=alert(2)&gt;"') == 2


def test_how_far_the_model_has_moved(whole: Path) -> None:
    assert "How far the model has moved" not in page_of(whole)
    results = whole / "results.jsonl"
    first = json.loads(results.read_text().splitlines()[0])
    with results.open("a") as lines:
        for metric, after, name, value in (
            ("word_agreement", "digits", "digits", 87.5),
            ("word_agreement", "digits", "flags", 93.75),
            ("mean_distance", "digits", "digits", 0.0123),
        ):
            new = {"metric": metric, "after_task": after, "eval_dataset": name, "value": value}
            lines.write(json.dumps(first | new) + "\n")
    page = Page(page_of(whole))
    columns = page.rows[0][1:-1]
    for values in ({"digits": "87.5", "flags": "93.8"}, {"digits": "0.0123"}):
        assert ["digits", *(values.get(column, "") for column in columns)] in page.rows


def test_times(whole: Path) -> None:
    # A first step that is slow is one of 15 here.
    slow = {"loading": 1.0, "gradients": 0.231}
    add_step(whole, replace(record("flags", 2, 1, 15), seconds=slow))
    add_step(whole, record("flags", 2, 15, 15))
    rows = Page(page_of(whole)).rows
    assert [ZERO_SHOT, "", "", "", "", "4.5"] in rows
    assert ["digits", "4.2", "6", "231", "104", "4.5"] in rows
    assert ["flags", "4.2", "15", "298", "105", "4.5"] in rows


@pytest.mark.drawn
def test_figures_have_a_title_and_a_description(whole: Path) -> None:
    text = page_of(whole)
    assert text.count("<svg") == text.count('aria-hidden="true"') == text.count("</svg>") == 10
    figures = re.findall(r'<figure role="group" aria-label="([^"]+)">\n<h3>(.*?)</h3>', text)
    assert len(figures) == 10 and all(label == title for label, title in figures)
    assert not re.search(r"<figcaption></figcaption>", text)


def test_captions_have_rows_of_the_last_model_too(make: Make) -> None:
    text = page_of(make("a", captions=("a",)))
    (table,) = re.findall(r"<h2[^>]*>Images and captions.*?</table>", text, re.DOTALL)
    for model in ("zero-shot", "learned", "last"):
        assert f">{model}<" in table


def test_a_bare_matrix_has_a_page(tmp_path: Path) -> None:
    write_matrix(tmp_path / "matrix.csv", AccuracyMatrix(("a",), ("a",), ((12.5,),)))
    text = page_of(tmp_path)
    page = Page(text)
    assert ["a", "12.5"] in page.rows
    assert "Average|12.50" in "|".join(page.cards)
    assert f"<title>{tmp_path.name}</title>" in text
    assert "unknown</strong>" in text
    assert "<li>env.json is not there: no environment and fingerprint</li>" in text
    assert text.count("<summary>") == 1 and "<summary>Definitions" in text
    assert "Learned 1 task: mean 12.5 %. a 12.5." in text


def test_a_run_before_its_first_evaluation_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "args.yaml").write_text("method: mulki\n")
    text = page_of(tmp_path)
    assert Page(text).open == []
    assert (
        "This folder holds no accuracies." in text
        and "tasks learned" not in text
        and "matrix.csv is not there" in text
    )


def test_long_lists_of_classes_are_cut_to_what_changed_most(whole: Path) -> None:
    count = 12
    content = json.loads((whole / "tasks.json").read_text())
    for each in content["tasks"]:
        each["classes"] = [f"class {i} {'x' * 300}" for i in range(count)]
        each["targets"] = [*range(count)]
    (whole / "tasks.json").write_text(json.dumps(content))
    text = page_of(whole)
    assert "left out" not in re.sub(r"left\s+out", "left out", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mulki.report.html._CLASSES", 30)
        cut = page_of(whole)
    assert cut.count("10 classes whose accuracy has changed most; left out: 2.") == 3


ASK = """
const tabs = [...document.querySelectorAll("[role=tab]")];
const panels = [...document.querySelectorAll("[role=tabpanel]")];
const shown = () => panels.map((panel) => panel.getBoundingClientRect().height > 0);
said.tabs = tabs.map((tab) => tab.textContent);
said.first = shown();
tabs[1].click();
said.second = shown();
tabs[1].focus();
tabs[1].dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
said.third = shown();
const table = panels[2].querySelector("table");
const column = (n) => [...table.tBodies[0].rows].map((row) => row.cells[n].textContent);
table.querySelectorAll("th button")[0].click();
said.up = column(0);
table.querySelectorAll("th button")[0].click();
said.down = column(0);
table.querySelectorAll("th button")[5].click();
said.change = column(5);
said.sort = [...table.tHead.rows[0].cells].map((head) => head.getAttribute("aria-sort"));
said.figures = [...document.querySelectorAll("figure svg")].every(
  (svg) => svg.getBoundingClientRect().height > 100);
said.wide = document.documentElement.scrollWidth > innerWidth;
const outer = document.querySelector("#matrix .scroll");
outer.scrollLeft = 1e6;
const cells = outer.querySelector("thead tr").cells;
said.reach = cells[cells.length - 1].getBoundingClientRect().right <= innerWidth + 1;
"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1400, 500])
@pytest.mark.drawn
def test_in_a_browser(whole: Path, tmp_path: Path, width: int) -> None:
    # A headless Chromium has no window narrower than 500 pixels.
    text = page_of(whole)
    said = said_in_browser(text, ASK, tmp_path, width)
    assert said["errors"] == 0 and said["figures"] and not said["wide"] and said["reach"]
    assert said["tabs"] == [*TASKS]
    assert [said[k] for k in ("first", "second", "third")] == [
        [place == chosen for place in range(3)] for chosen in range(3)
    ]
    assert said["up"] == ["left", "right"] and said["down"] == ["right", "left"]
    numbers = [float(value.replace("\N{MINUS SIGN}", "-")) for value in said["change"]]
    assert numbers == sorted(numbers)
    assert said["sort"] == ["none"] * 5 + ["ascending"]


def test_results_with_a_head_stand_on_the_cards(tmp_path: Path) -> None:
    text = page_of(write_whole_run(tmp_path, head=True))
    cards = "|".join(Page(text).cards)
    assert "|with head 100.00|" in cards and "class statistics answer beside the texts" in text
    assert "class statistics" not in page_of(write_whole_run(tmp_path, name="other"))
