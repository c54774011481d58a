"""Features of the original model in files, so that later runs need not encode them again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from uuid import uuid4

import torch
from torch import Tensor

from mulki.clip.tensor_files import CHECKSUM, load_tensors, save_tensors
from mulki.distributed.world import World
from mulki.errors import InputError

_FEATURES = "features"


class TeacherCache:
    """Features of the original model, each kind of a task in a file that is mapped into memory.

    The name of a file is a hash of all that its features depend on, and its metadata say what that
    was. So other weights, images, texts or another precision have files of their own beside it. A
    file that is made again on the same machine has the same bits.

    Args:
        folder: is made where it is missing.
        model: what the model is and how it computes: its weights, its architecture, its precision,
            how many inputs it gets at a time, by name.
        world: the processes that encode together.
        device: of this process.

    Raises:
        InputError: the folder cannot be made.
    """

    def __init__(self, folder: Path, model: Mapping[str, str], world: World, device: torch.device):
        self._folder, self._model, self._world, self._device = folder, model, world, device
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--teacher-cache: cannot make the folder {folder} ({error.strerror}); pass "
                "another one"
            ) from None

    def features(self, of: Mapping[str, object], encode: Callable[[], Tensor]) -> Tensor:
        """Features [n, D] on the CPU, from their file; all processes have to ask for them.

        Args:
            of: what is encoded, by name, as JSON takes it.
            encode: to the features, in all processes; not called where each has the file.

        Raises:
            InputError: a file that is damaged or is of something else, or that cannot be written.
        """
        made_of = {**self._model, **{name: _hash(value) for name, value in of.items()}}
        path = self._folder / f"{_hash(sorted(made_of.items()))}.safetensors"
        if not self._world.smallest(os.path.isfile(path), self._device):
            features = encode()
            # The first one alone where all have one disk, and then those that do not see its file.
            for here in (self._world.main, True):
                missing = here and not os.path.isfile(path)
                problem = _save(path, features, made_of) if missing else None
                self._world.agree(self._device, problem)
        found, checksum, problem = torch.empty(0), "", None
        try:
            found, checksum = _load(path, made_of)
        except InputError as error:
            problem = error
        # Each process may have a folder of its own.
        self._world.agree(self._device, problem, **{"features of --teacher-cache (hash)": checksum})
        return found


def _save(path: Path, features: Tensor, made_of: Mapping[str, str]) -> InputError | None:
    # Other runs may write the same file, on other machines too.
    temporary = path.with_name(f".{path.stem}.{uuid4().hex}.safetensors")
    try:
        save_tensors(temporary, {_FEATURES: features.detach().cpu()}, made_of)
        os.replace(temporary, path)
    except OSError as error:
        return InputError(f"--teacher-cache: cannot write {path} ({error.strerror}); pass another")
    finally:
        temporary.unlink(missing_ok=True)
    return None


def _load(path: Path, made_of: Mapping[str, str]) -> tuple[Tensor, str]:
    try:
        tensors, metadata = load_tensors(path)
    except InputError as error:
        raise InputError(f"--teacher-cache: {error}; without it, it is made again") from None
    for name, value in made_of.items():
        if metadata.get(name) != value:
            raise InputError(
                f"--teacher-cache: {path} is of another {name} ({metadata.get(name)}) than its "
                f"name says ({value}); remove it, and it is made again"
            )
    return tensors[_FEATURES], metadata[CHECKSUM]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
