"""What a command that trains does to its process."""

from __future__ import annotations

import logging

import pytest

from mulki.app.cli import main
from mulki.app.commands.training import prepare_process


@pytest.fixture(autouse=True)
def memory_left_alone(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What is noted in place of keeping freed memory."""
    called: list[bool] = []
    monkeypatch.setattr(
        "mulki.train.learning.memory.keep_freed_memory", lambda: called.append(True)
    )
    return called


@pytest.mark.parametrize(
    ("processes", "rank", "first"), [("2", "0", True), ("2", "1", False), (None, "1", True)]
)
def test_the_first_process_prints_warnings(
    processes: str | None,
    rank: str,
    first: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("WORLD_SIZE", processes)
    # As a process begins.
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    prepare_process()
    log = logging.getLogger("mulki.something")
    log.info("a step")
    log.warning("careful\x1b[31m")
    log.error("the line that ends a run is printed elsewhere")
    assert capsys.readouterr().err == ("mulki: careful\\x1b[31m\n" if first else "")


def test_freed_memory_is_kept(memory_left_alone: list[bool]) -> None:
    prepare_process()
    assert memory_left_alone == [True]


@pytest.mark.parametrize("command", [["eval", "none"], ["predict", "none", "a.png"]])
def test_freed_memory_is_kept_where_a_model_only_answers(
    command: list[str], memory_left_alone: list[bool]
) -> None:
    with pytest.raises(SystemExit):
        main(command)
    assert memory_left_alone == [True]


def test_messages_of_packages_that_print_themselves_are_not_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    prepare_process()
    hub = logging.getLogger("huggingface_hub")
    monkeypatch.setattr(hub, "handlers", [logging.StreamHandler()])
    logging.getLogger("huggingface_hub.utils").warning("Careful")
    monkeypatch.setattr(hub, "handlers", [])
    logging.getLogger("huggingface_hub.utils").warning("alone")
    for retry in (1, 2):
        for text in (
            "'Error' thrown while requesting HEAD x",
            f"Retrying in 1s [Retry {retry}/5].",
        ):
            logging.getLogger("huggingface_hub.utils._http").warning(text)
    lines = ["Careful", "mulki: alone", "mulki: Retrying in 1s [Retry 1/5]."]
    assert capsys.readouterr().err.splitlines() == lines
