from __future__ import annotations

import pytest
import torch
from torch import nn

from mulki.errors import InputError
from mulki.train.config import precision as precision_module
from mulki.train.config.precision import Precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32),
        ("amp_bf16", torch.bfloat16),
        ("amp_bfloat16", torch.bfloat16),
        ("amp", torch.bfloat16),  # float16 needs a GPU
    ],
)
def test_autocast_dtype(name: precision_module.Name, dtype: torch.dtype) -> None:
    precision = Precision(name, CPU)
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == dtype
    assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.float32
    assert not precision.scaler.is_enabled()


@pytest.mark.parametrize(("native", "name"), [(True, "amp_bf16"), (False, "fp32")])
def test_auto_takes_bf16_only_where_it_is_native(
    monkeypatch: pytest.MonkeyPatch, native: bool, name: str
) -> None:
    monkeypatch.setattr(precision_module, "native_bf16", lambda device: native)
    assert Precision("auto", CPU).name == name
    assert Precision("fp32", CPU).name == "fp32"


@pytest.mark.parametrize("name", ["bf16", "fp16", "pure_bf16", "pure_fp16"])
def test_stored_precision_needs_no_autocast(name: precision_module.Name) -> None:
    precision = Precision(name, CPU)
    assert precision.dtype == (torch.float16 if name.endswith("fp16") else torch.bfloat16)
    with precision.autocast():
        assert nn.Linear(4, 4)(torch.ones(2, 4)).dtype == torch.float32
    assert not precision.scaler.is_enabled()


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("fp32", None),
        ("amp_bf16", None),
        ("bf16", (torch.bfloat16, False)),
        ("pure_bf16", (torch.bfloat16, True)),
        ("fp16", (torch.float16, False)),
        ("pure_fp16", (torch.float16, True)),
    ],
)
def test_weights_are_converted_as_the_name_says(
    name: precision_module.Name, stored: tuple[torch.dtype, bool] | None
) -> None:
    asked: list[tuple[torch.dtype, bool]] = []

    class Model:
        def store(self, dtype: torch.dtype, *, norms: bool) -> None:
            asked.append((dtype, norms))

    Precision(name, CPU).convert(Model())  # type: ignore[arg-type]
    assert asked == ([] if stored is None else [stored])


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="^--precision: got 'amp_bf61'.*fp32"):
        Precision("amp_bf61", CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("instructions", "cpu", "native"),
    [
        ({"amx_tile", "avx512_bf16"}, "Intel(R) Xeon(R) Platinum 8481C", True),
        ({"avx512_bf16"}, "Intel(R) Xeon(R) Processor", False),
        ({"avx512_bf16"}, "AMD EPYC 9B14", True),
        (set(), "AMD EPYC 7B13", False),
    ],
)
def test_cpus_that_multiply_bf16_faster(
    monkeypatch: pytest.MonkeyPatch, instructions: set[str], cpu: str, native: bool
) -> None:
    monkeypatch.setattr(precision_module, "_has", instructions.__contains__)
    monkeypatch.setattr(precision_module, "cpu_model", lambda: cpu)
    assert precision_module.native_bf16(CPU) == native


def test_devices_without_bf16_are_not_asked_for_it() -> None:
    assert not precision_module.native_bf16(torch.device("meta"))
