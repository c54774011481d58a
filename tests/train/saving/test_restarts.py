"""What torchrun starts again goes on with its own run, on all machines alike."""

from __future__ import annotations

import datetime
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from mulki.distributed.roll_call import Meeting
from mulki.distributed.torchrun import launcher
from mulki.errors import InputError
from mulki.train.config.run_config import read_config, resolve
from mulki.train.saving.restarts import restart_of
from tests.train.run_helpers import Run


def test_what_torchrun_starts_again_finds_its_folder(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    settings = resolve(read_config(run("first", method="zero_shot").path / "args.yaml"))
    assert restart_of(settings) is None
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(InputError, match="--name: got none beside --max-restarts"):
        restart_of(replace(settings, run=replace(settings.run, name=None)))
    assert restart_of(settings) == (settings, tmp_path / "logs" / "first")
    # It goes on with the precision that it began with.
    automatic = replace(settings, run=replace(settings.run, precision="auto"))
    assert restart_of(automatic) == (settings, tmp_path / "logs" / "first")
    with pytest.raises(InputError, match="^--lr: .*first .*0.001, .*1"):
        restart_of(replace(settings, run=replace(settings.run, lr=1.0)))
    # What had not got as far as a result starts again.
    assert restart_of(replace(settings, run=replace(settings.run, name="new"))) is None
    # A first result is on disk before the matrix is.
    (tmp_path / "logs" / "first" / "matrix.csv").unlink()
    assert restart_of(settings) == (settings, tmp_path / "logs" / "first")
    # A folder of another torchrun is nobody's to take.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "def")
    assert restart_of(settings) is None


def test_several_machines_agree_on_the_folder_to_go_on_with(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "abc")
    settings = resolve(read_config(run("first", method="zero_shot").path / "args.yaml"))
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setattr("mulki.distributed.launch.launched", lambda: True)
    ours, other = launcher(), "torchrun abc 1 on another"

    def found(
        launchers: list[str | None], most: tuple[str, str] = ("3", "3"), **options: Any
    ) -> Any:
        store, results = dist.HashStore(), []
        store.set_timeout(datetime.timedelta(seconds=10))
        words = tuple([m, who, "here"] for who, m in zip(launchers, most, strict=True))
        for rank, logs in enumerate([settings.run.logs, "/elsewhere"]):
            met = Meeting(store, rank, 2, words)
            monkeypatch.setattr("mulki.distributed.launch.meeting", lambda met=met: met)
            config = replace(settings.run, logs=logs, **options)
            try:
                results.append(restart_of(replace(settings, run=config)))
            except InputError as error:
                results.append(str(error))
        return results

    # Another machine may have the first process by now.
    for launchers in ([ours, other], [other, ours]):
        (_, here), (_, there) = found(launchers)
        assert (here, there) == (tmp_path / "logs" / "first", Path("/elsewhere/first"))
    assert found(["torchrun def 2 on one", other]) == [None, None]
    assert found([ours, other], ("0", "0")) == [None, None]
    problems = found([ours, other], lr=1.0)
    assert "--lr: " in problems[0] and problems[0] == problems[1]
