"""Names of torch that are not public: with them, without them, and what is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
import torch

from mulki.ops import torch_private
from tests import ROOT


def test_they_are_used_with_a_torch_that_was_tested(monkeypatch):
    monkeypatch.delenv("MULKI_TORCH_PRIVATE", raising=False)
    monkeypatch.setattr(torch, "__version__", "2.11.0")
    found, reason = torch_private._find()
    assert reason is None and "check" in found


@pytest.mark.parametrize(
    ("version", "setting", "reason"),
    [
        ("2.11.0", "0", "MULKI_TORCH_PRIVATE is 0"),
        ("2.99.0+cu140", None, "torch 2.99.0[+]cu140 is newer than 2.15"),
        ("3.0.0", "", "torch 3.0.0 is newer than 2.15"),
    ],
)
def test_the_reason_why_they_are_not_used(monkeypatch, version, setting, reason):
    monkeypatch.delenv("MULKI_TORCH_PRIVATE", raising=False)
    if setting is not None:
        monkeypatch.setenv("MULKI_TORCH_PRIVATE", setting)
    monkeypatch.setattr(torch, "__version__", version)
    found, why = torch_private._find()
    assert found == {}
    assert why is not None and re.match(reason, why)


def test_a_newer_torch_may_be_tried_with_them(monkeypatch):
    monkeypatch.setenv("MULKI_TORCH_PRIVATE", "1")
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    assert torch_private._find()[1] is None


def test_the_check_without_them(monkeypatch):
    monkeypatch.setattr(torch_private, "_private", {})
    torch_private.check(ValueError, True, lambda: "fine")
    with pytest.raises(TypeError, match="^w: wrong$"):
        torch_private.check(TypeError, False, lambda: "w: wrong")
    assert torch_private.forward_mode_may_be_on()
    assert not torch_private.nothing_listens()
    assert not torch_private.is_last_plain_backward(torch.ones(()))


@pytest.mark.slow
def test_operators_have_the_same_gradients_in_the_public_way():
    """The tests of gradients, for some operators, in a process that takes the public way."""
    names = "kl_label or kl_weights or compiled or vmap or forward_mode"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", names]
    command += ["tests/ops/test_autograd.py", "tests/ops/test_compile.py"]
    environment = os.environ | {"MULKI_TORCH_PRIVATE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
