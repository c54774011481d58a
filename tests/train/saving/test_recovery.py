from __future__ import annotations

import errno
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from mulki.errors import InputError, Stopped
from mulki.train.saving.recovery import FILE, Saves, changed, read_state, write_state
from mulki.train.saving.signals import Signals
from tests.ranks import run_ranks

STATE: dict[str, Any] = {
    "numbers": [1, 2.5, 1e-300, None, True, "text ü"],
    "weights": {"a.b": torch.randn(3, 2), "flags": torch.tensor([True])},
    "deep": [{"tensor": torch.tensor(1.5), "dict": {"x": []}}],
}


def read(folder: Path) -> dict[str, Any]:
    """The save in a folder, without its checksum."""
    state = read_state(folder)
    assert state is not None and len(state.pop("sha256")) == 64
    return state


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other and type(one) is type(other)


def path_in(folder: Path) -> Path:
    (folder / "recovery").mkdir()
    return folder / "recovery" / FILE


def test_a_state_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_state(path_in(tmp_path), STATE)
    assert same(STATE, read(tmp_path))
    assert read_state(tmp_path / "other") is None


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    one = torch.arange(4.0)
    write_state(path_in(tmp_path), {"whole": one, "again": one, "part": one[1:3]})
    found = read_state(tmp_path)
    assert found is not None and same(found["again"], one) and same(found["part"], one[1:3])


def written_by_two(rank: int, world: int, path: str) -> None:
    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(torch.arange(15.0).view(5, 3), mesh, [Shard(0)])
    state = {"a": [{"b": sharded}, torch.ones(2)], "c": (1, None, "text")}
    write_state(Path(path) if rank == 0 else None, state)


def test_tensors_of_which_each_process_has_a_part(tmp_path: Path) -> None:
    run_ranks(2, written_by_two, str(path_in(tmp_path)))
    whole = {"a": [{"b": torch.arange(15.0).view(5, 3)}, torch.ones(2)], "c": [1, None, "text"]}
    assert same(read(tmp_path), whole)


def test_what_json_does_not_hold_is_named(tmp_path: Path) -> None:
    path = path_in(tmp_path)
    with pytest.raises(TypeError, match="Path: a save holds tensors, numbers and texts"):
        write_state(path, {"place": tmp_path})
    with pytest.raises(TypeError, match="3: a save holds dicts whose keys are texts"):
        write_state(path, {"means": [{"a": 1}, {3: torch.ones(1)}]})
    assert not path.exists()


def saves(folder: Path, **options: Any) -> Saves:
    made = Saves(folder, **options)
    made.of_run(lambda in_task: {"student": {}, "in_task": in_task})
    return made


def steps_saved(made: Saves, folder: Path, steps: int, seconds: float = 0.0) -> list[int]:
    found, done = [], 0
    with made.within_task(lambda: {"steps": done}) as step:
        for number in range(1, steps + 1):
            with step(number):
                time.sleep(seconds)
                done = number
            state = read_state(folder)
            if state is not None and state["in_task"]["steps"] == number:
                found.append(number)
    return found


def test_saves_after_every_so_many_steps(tmp_path: Path) -> None:
    assert steps_saved(saves(tmp_path, every=3), tmp_path, 7) == [3, 6]
    assert steps_saved(saves(tmp_path / "none", every=0), tmp_path / "none", 7) == []


def test_saves_cost_a_small_part_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made = saves(tmp_path, size=int(2e8))  # taken to cost a second

    def save_for_two_seconds(in_task: Any) -> dict[str, Any]:
        now[0] += 2
        return {"in_task": in_task}

    made.of_run(save_for_two_seconds)
    found, done = [], 0
    with made.within_task(lambda: {"steps": done}) as step:
        for number in range(1, 301):
            before = now[0]
            with step(number):
                now[0] += 1
                done = number
            if now[0] - before > 1:
                found.append(number)
    # After 49 steps of a second, then after 98, since it took two.
    assert found == [49, 147, 245]


def test_an_error_between_steps_is_raised_after_a_save(tmp_path: Path) -> None:
    done = 0
    with (
        pytest.raises(RuntimeError),
        saves(tmp_path, every=0).within_task(lambda: {"steps": done}) as step,
    ):
        with step(1):
            done = 1
        raise RuntimeError
    state = read_state(tmp_path)
    assert state is not None and state["in_task"]["steps"] == 1


def test_an_error_in_a_step_leaves_the_older_save(tmp_path: Path) -> None:
    done = 0
    with (
        pytest.raises(RuntimeError),
        saves(tmp_path, every=1).within_task(lambda: {"steps": done}) as step,
    ):
        for number in (1, 2):
            with step(number):
                if number == 2:
                    raise RuntimeError
                done = number
    state = read_state(tmp_path)
    assert state is not None and state["in_task"]["steps"] == 1


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("sent", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_in_a_step_is_raised_after_it_and_a_save(
    tmp_path: Path, request: pytest.FixtureRequest, sent: str
) -> None:
    # A process in the background of a shell ignores some of them.
    before = signal.signal(signal.Signals[sent], signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(signal.Signals[sent], before))
    done = 0
    with (
        pytest.raises(Stopped, match=sent),
        Signals() as signals,
        saves(tmp_path, signals=signals, every=0).within_task(lambda: {"steps": done}) as step,
    ):
        for number in (1, 2):
            with step(number):
                if number == 1:
                    os.kill(os.getpid(), signal.Signals[sent])
                done = number
    state = read_state(tmp_path)
    assert done == 1 and state is not None and state["in_task"]["steps"] == 1


@pytest.mark.parametrize("bad", ["inf", "nan"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, bad: str) -> None:
    made = saves(tmp_path)
    made.save()
    made.of_run(lambda in_task: {"student": {"a": torch.ones(2), "b": torch.tensor(float(bad))}})
    with pytest.raises(InputError, match=r"student: 1 of 2 .* b; "):
        made.save()
    assert same(read(tmp_path), {"student": {}, "in_task": None})


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    made = saves(tmp_path)
    made.save()

    def full(*given: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, broken, full)
        made.save({"steps": 3})
    assert same(read(tmp_path), {"student": {}, "in_task": None})
    assert os.listdir(tmp_path / "recovery") == [FILE]


def test_a_hash_that_an_older_folder_lacks_is_passed_over(tmp_path: Path) -> None:
    hashes = {"weights": "w", "tests": {"a": "e"}}
    for known, says in (({"weights": "w"}, None), ({"weights": "v"}, "weights"), ({}, "weights")):
        (tmp_path / "env.json").write_text(json.dumps({"hashes": known}))
        assert changed(tmp_path, hashes) == says
