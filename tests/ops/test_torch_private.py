"""Names of torch that are not public: with them, without them, and what is said."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types

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


class Without:
    """A module or class that lacks one of its names."""

    def __init__(self, whole, missing):
        self._whole, self._missing = whole, missing

    def __getattr__(self, name):
        if name == self._missing:
            raise AttributeError(f"no {name}")
        return getattr(self._whole, name)


@pytest.mark.parametrize(
    "path",
    [
        "torch._check_with",
        "torch._C._autograd",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._functorch",
        "forward_ad._current_level",
    ],
)
def test_a_name_that_is_missing_is_a_reason_and_no_crash(monkeypatch, path):
    monkeypatch.setenv("MULKI_TORCH_PRIVATE", "1")
    first, *middle, missing = path.split(".")
    stand_in = Without(getattr(torch_private, first), middle[0] if middle else missing)
    if middle:
        inner = Without(getattr(getattr(torch_private, first), middle[0]), missing)
        stand_in.__dict__[middle[0]] = inner
    monkeypatch.setattr(torch_private, first, stand_in)
    found, why = torch_private._find()
    assert found == {} and why is not None and missing in why


def test_a_kernel_that_torch_does_not_tell_of_is_taken_to_be_there(monkeypatch):
    operators = types.SimpleNamespace(
        mulki_cpp=types.SimpleNamespace(siglip=types.SimpleNamespace(default=object()))
    )
    monkeypatch.setattr(torch, "ops", operators)
    assert torch_private.has_cpu_kernel("siglip")


def test_the_check_without_them(monkeypatch):
    monkeypatch.setattr(torch_private, "_private", {})
    torch_private.check(ValueError, True, lambda: "fine")
    with pytest.raises(TypeError, match="^w: wrong$"):
        torch_private.check(TypeError, False, lambda: "w: wrong")
    assert not torch_private.forward_mode_is_off()
    assert not torch_private.is_last_plain_backward(torch.ones(()))


@pytest.mark.slow
def test_operators_have_the_same_gradients_in_the_public_way():
    """The tests of gradients, for some operators, in a process that takes the public way."""
    names = "kl_label or kl_weights or ce_all or contrastive or compiled or vmap or forward_mode"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", names]
    command += ["tests/ops/test_autograd.py", "tests/ops/test_compile.py"]
    environment = os.environ | {"MULKI_TORCH_PRIVATE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
