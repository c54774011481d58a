"""`mulki.info`: one callable module in every import order, and what its text says."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

import mulki
import tests
from mulki.info import Info, _serving
from mulki.kernels import lookup
from mulki.ops import backends, loader
from mulki.ops.backends import Served

# As of a module that is imported twice.
python = partial(tests.python, PYTHONWARNINGS="error::RuntimeWarning")
#: Runs each code in a process that has imported torch, and nothing else.
FORKS = """
import os, sys, traceback, torch
for code in sys.argv[1:]:
    if not (child := os.fork()):
        status = 1
        try:
            exec(code, {})
            status = 0
        except BaseException:
            traceback.print_exc()
        os._exit(status)
    assert os.waitpid(child, 0)[1] == 0, code
"""
ORDERS = (
    "import mulki.info; mulki.info(); from mulki import info; info(), mulki.info.info()",
    "from mulki.info import info; info(); import mulki; mulki.info(); mulki.info.Info",
)
# `import mulki` neither collects nor loads anything.
LIGHT = (
    "import sys, mulki\n"
    "assert 'mulki.info' not in sys.modules\n"
    "assert not any('_cpu_' in x for x in torch.ops.loaded_libraries)"
)


def test_before_torch() -> None:
    code = "import mulki; a = mulki.info(); import mulki.info as m; b = mulki.info(), m(), m.info()"
    python("-c", code)


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has imported torch")
def test_every_import_order() -> None:
    python("-c", FORKS, *ORDERS, f"import torch\n{LIGHT}")


def test_a_backend_that_does_not_exist_is_told_and_auto_reported(monkeypatch, capsys) -> None:
    monkeypatch.delenv("MULKI_BACKEND", raising=False)
    expected = backends.report()
    monkeypatch.setenv("MULKI_BACKEND", "eager")
    backends.read_environment()
    with pytest.raises(ValueError, match="^MULKI_BACKEND: got 'eager'"):
        backends.report()
    text = python("-m", "mulki.info")
    assert text.startswith("versions\n") and f"mulki      {mulki.__version__}" in text
    assert "MULKI_BACKEND" in text
    assert mulki.info().operators == expected
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("MULKI_BACKEND: got 'eager', wanted one of auto")


def test_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MULKI_STRICT", "0")
    found = mulki.info()
    assert isinstance(found, Info) and repr(found) == str(found)
    assert found.versions["torch"] == torch.__version__
    assert found.versions["mulki"].split(",")[0] == mulki.__version__
    assert found.environment["MULKI_STRICT"] == "0"
    assert found.operators == backends.report()
    text = str(found)
    assert "MULKI_STRICT" in text and torch.backends.cpu.get_cpu_capability() in text
    reason = loader.load()
    assert reason is None or f"not cpp: {reason}\n" in text + "\n"


def test_operators_that_share_their_reasons_share_a_paragraph() -> None:
    why = {"cpp": "not built: run `make the kernels`"}
    served = [
        Served(op, "cpu", dtype, backend, rejected)
        for op, backend, rejected in [("a", "cpp", {}), ("b", "reference", why), ("c", "cpp", {})]
        for dtype in (torch.float32, torch.bfloat16)
    ]
    served.append(Served("b", "cpu", torch.float16, "cpp", {}))
    assert _serving(served) == [
        "  cpu, float32 and bfloat16: cpp",
        "    a, c",
        "  cpu, float32 and bfloat16: reference",
        "    b",
        "    not cpp: not built: run `make the kernels`",
        "  cpu, float16: cpp",
        "    b",
    ]


def test_fallbacks_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    fallen = Served("siglip", "cpu", torch.float16, "reference", {"cpp": "it is Sunday"})
    monkeypatch.setattr(backends, "fallbacks", lambda: [fallen])
    text = str(mulki.info())
    assert text.index("fallbacks so far") < text.index("not cpp: it is Sunday")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MULKI_BACKEND", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    backends.read_environment()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: False)


def gpu_paragraph() -> list[str]:
    """What is said of GPUs, of both dtypes and of every operator with a Triton kernel."""
    _, paragraph = str(mulki.info()).split("  cuda, float32 and bfloat16: chunked\n")
    *lines, reason = paragraph.splitlines()
    ops = ", ".join(line.strip() for line in lines).replace(",,", ",").split(", ")
    assert sorted(ops) == sorted(lookup.OPERATORS)
    return [reason]


def test_without_a_gpu_the_triton_kernels_are_named_with_the_reason(no_gpu, monkeypatch) -> None:
    # Any module that can be imported by that name will do.
    monkeypatch.setitem(sys.modules, "triton", sys)
    assert gpu_paragraph() == ["    not triton: torch finds no GPU on this machine"]


def test_without_triton_its_kernels_are_named_with_the_reason(no_gpu, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    (line,) = gpu_paragraph()
    assert line.startswith("    not triton: triton is not importable (")
    assert line.endswith("install the one that this torch names")


def test_triton_that_is_installed_takes_nothing_from_cpu_tensors(monkeypatch) -> None:
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    for name in ("MULKI_BACKEND", "MULKI_STRICT", "TRITON_INTERPRET"):
        monkeypatch.delenv(name, raising=False)
    code = (
        "import sys, torch, mulki\n"
        "from mulki.ops import backends, loader\n"
        "x, y = torch.randn(5, 8, requires_grad=True), torch.randn(3, 8)\n"
        "mulki.functional.prototype_similarity(x, y).sum().backward()\n"
        "served = {s.backend for s in backends.report() if s.device_type == 'cpu'}\n"
        "assert served == {'chunked' if loader.load() else 'cpp'}, served\n"
        "assert loader.load() or backends.fallbacks() == []\n"
        "print([m for m in sys.modules if m.startswith('mulki.kernels.')])"
    )
    assert python("-c", code).strip() == "['mulki.kernels.lookup']"


def test_an_attribute_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'infos'"):
        mulki.infos  # noqa: B018
