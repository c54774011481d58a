"""A whole run on a file system that fills up in a save: nothing is lost, and it goes on."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml

from mulki.train.config.run_config import resolve
from mulki.train.saving.recovery import FILE, read_state
from tests.train.run_helpers import SHORT, Run, stop_at, weights
from tests.train_helpers import same_state

pytestmark = pytest.mark.long

# In a namespace of its own, where mounting a small file system needs no rights. Figures are left
# out, since drawing takes longer than the run.
SCRIPT = """
size=$1 disk=$2 config=$3 out=$4
shift 4
mount -t tmpfs -o "size=$size" none "$disk" || exit 99
"$@" --config "$config" 2>"$out/errors"
echo $? >"$out/status"
cp -r "$disk/full" "$out/before"
mount -o remount,size=1g "$disk"
"$@" --resume "$disk/full" && cp -r "$disk/full" "$out/after"
"""
MULKI = (
    "import mulki.report.html as h; h.plots = lambda contents: []; "
    "import mulki.app.cli as c; c.main()"
)


def alone(*command: str) -> Sequence[str]:
    return ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", *command]


def can_mount(folder: Path) -> bool:
    try:
        mount = f"mount -t tmpfs -o size=1m none '{folder}'"
        return subprocess.run(alone(mount), capture_output=True).returncode == 0
    except OSError:
        return False


# The size of the file system in saves. A new one is written beside the old one, so it holds one
# save and not two; or two, but not beside the checkpoints of a task.
@pytest.mark.parametrize(("size", "learned"), [(1.5, 0), (2.3, 1)])
def test_a_disk_that_fills_up(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    start_model: dict[str, str],
    task_folders: tuple[str, str],
    size: float,
    learned: int,
) -> None:
    if not can_mount(tmp_path):
        pytest.skip("no file system can be mounted here")
    options = {"method": "finetune", "save_every": 1}
    whole = run("whole", **options)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        stop_at(patch, 1, RuntimeError("stop"))
        run("stopped", **options)
    save = (tmp_path / "logs" / "stopped" / "recovery" / FILE).stat().st_size
    disk = tmp_path / "disk"
    disk.mkdir()
    given = {**SHORT, **start_model, **options, "tasks": task_folders, "logs": str(disk)}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(resolve({**given, "name": "full"}).to_dict()))
    command = [SCRIPT, "sh", str(int(size * save)), str(disk), str(config), str(tmp_path)]
    # Other threads round in another way.
    threads = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(alone(*command, sys.executable, "-c", MULKI, "run"), check=True, env=threads)

    assert (tmp_path / "status").read_text().split() == ["1"]
    *progress, line = (tmp_path / "errors").read_text().splitlines()
    assert line.startswith("mulki: error: ") and line.endswith(f"{FILE}: No space left on device")
    assert not [each for each in progress if "mulki: " in each or "Traceback" in each], progress
    before = read_state(tmp_path / "before")
    assert before is not None and before["learned"] == learned
    assert before["in_task"]["steps"] == 1
    assert same_state(weights(tmp_path / "after"), weights(whole))
