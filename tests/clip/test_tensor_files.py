from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mulki.clip import tensor_files
from mulki.clip.tensor_files import load_tensors, save_tensors
from mulki.errors import InputError

TENSORS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.tensor(7, dtype=torch.int64),
    "half": torch.ones(3, dtype=torch.bfloat16),
    "none": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
}


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(
        torch.equal(v, found[n]) and v.dtype == found[n].dtype for n, v in TENSORS.items()
    )


def test_what_was_written_is_read(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x.safetensors", TENSORS, {"model": "m"})
    tensors, metadata = load_tensors(tmp_path / "x.safetensors")
    assert same(tensors) and metadata.keys() == {"model", "sha256"} and metadata["model"] == "m"
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_flipped_bit_is_found_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {"model": "m"})
    content = path.read_bytes()
    found = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        try:
            tensors, metadata = load_tensors(path)
        except InputError:
            found += 1
        else:
            # Spaces and the checksum's own name hold no content.
            assert same(tensors) and metadata["model"] == "m"
    assert found > 0.9 * len(content)


def test_the_same_content_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    metadata = {"format": "pt", "model": "m", "a": "1", "b": "ü"}
    save_tensors(first, TENSORS, metadata)
    backwards = dict(reversed(TENSORS.items())), dict(reversed(metadata.items()))
    save_tensors(second, *backwards)
    assert first.read_bytes() == second.read_bytes()
    assert same(load_file(second)) and load_tensors(second)[1].items() > metadata.items()


def test_views_of_one_tensor(tmp_path: Path) -> None:
    one = torch.arange(6.0).reshape(2, 3)
    save_tensors(tmp_path / "x.safetensors", {"whole": one, "part": one[1:], "turned": one.T}, {})
    found, _ = load_tensors(tmp_path / "x.safetensors")
    assert torch.equal(found["part"], one[1:]) and torch.equal(found["turned"], one.T)


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_others_may_read_it_as_any_other_file(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        save_tensors(tmp_path / "x.safetensors", TENSORS, {})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == mode


def test_a_file_of_another_program_has_no_checksum(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors")
    assert same(load_tensors(tmp_path / "x.safetensors")[0])


def test_what_is_no_such_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_tensors(path)
    save_tensors(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_tensors(path)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(InputError, match="pipe.safetensors"):
        load_tensors(tmp_path / "pipe.safetensors")


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no mount here")
    if done.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    return folder


def test_a_full_disk_keeps_the_older_file(small_disk: Path, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(lambda: subprocess.run(["umount", str(small_disk)]))
    path = small_disk / "x.safetensors"
    save_tensors(path, TENSORS, {})
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_tensors(path, {"large": torch.zeros(2**20)}, {})
    assert caught.value.filename == str(path)
    assert same(load_tensors(path)[0])
    assert os.listdir(small_disk) == ["x.safetensors"]


def test_what_reads_differently_does_not_replace_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save_tensors(path, TENSORS, {})
    real = tensor_files._bytes
    calls = []

    def bad_disk(value: torch.Tensor) -> bytes:
        calls.append(value)
        # After the checksum, which is taken of what was to be written.
        return bytes(real(value + 1 if len(calls) == 2 else value))

    monkeypatch.setattr(tensor_files, "_bytes", bad_disk)
    with pytest.raises(OSError, match="reads differently"):
        save_tensors(path, {"a": torch.ones(3)}, {})
    assert same(load_tensors(path)[0])
