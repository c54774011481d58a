"""Kernels that are compiled for a GPU by a process that has none."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="needs Triton, which this installation has not")

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from mulki.app.ahead_of_time import compile_launched, launches_of
from mulki.bench.cases import Case
from mulki.bench.losses import MULKI
from mulki.bench.outcomes import outcome
from mulki.kernels.launch import Launch

TARGET = GPUTarget("cuda", 90, 32)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", None)
    return tmp_path


def launches(operator: str, *shape: int) -> list[Launch]:
    case = Case(operator, *shape, "bfloat16", "meta")
    return launches_of([partial(outcome, MULKI[operator], case.inputs())], "sm_90")


def with_memory(value: Any) -> Any:
    """The same, but for tensors of the device "meta"."""
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype)
    if isinstance(value, dict):
        return {name: with_memory(member) for name, member in value.items()}
    if isinstance(value, tuple):
        members = map(with_memory, value)
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    return value


def forget(launched: list[Launch]) -> None:
    """What this process has compiled before."""
    for one in launched:
        one.kernel.device_caches.clear()


def test_what_is_compiled_is_what_tensors_with_memory_launch(cache: Path) -> None:
    of_siglip = launches("siglip", 100, 100, 72)
    assert {one.kernel.__name__ for one in of_siglip} == {"siglip_rows", "row_totals"}
    forget(of_siglip)
    compile_launched(of_siglip, TARGET)
    compiled = list(cache.glob("*/*.cubin"))
    # With and without gradients.
    assert len(compiled) == 4
    forget(of_siglip)
    compile_launched([with_memory(one) for one in of_siglip], TARGET)
    assert sorted(cache.glob("*/*.cubin")) == sorted(compiled)
    forget(of_siglip)  # other tests have other drivers


def test_every_way_to_compute_gradients_is_seen() -> None:
    assert len(launches("pair_kl", 16, 16, 16)) > 0
    case = Case("prototype_cross_entropy", 8, 20, 16, "float32", "meta")
    ours = MULKI["prototype_cross_entropy"]

    def of_rows(*operands: Any) -> Tensor:
        return ours(*operands, reduction="none").mean()

    found = launches_of([partial(outcome, of_rows, case.inputs())], "sm_90")
    assert any(one.arguments["inputs"].upstream is not None for one in found)
