"""`mulki.info`: one callable module in every import order, and what its text says."""

from __future__ import annotations

import sys
from functools import partial

import pytest
import torch

import mulki
import tests
from mulki.info import Info
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


def test_fallbacks_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    fallen = Served("siglip", "cpu", torch.float16, "reference", {"cpp": "it is Sunday"})
    monkeypatch.setattr(backends, "fallbacks", lambda: [fallen])
    text = str(mulki.info())
    assert text.index("fallbacks so far") < text.index("not cpp: it is Sunday")


def test_an_attribute_that_does_not_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'infos'"):
        mulki.infos  # noqa: B018
