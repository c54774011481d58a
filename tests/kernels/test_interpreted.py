"""Runs the kernels in Triton's interpreter, in a process of its own.

TRITON_INTERPRET has to be set before Triton is imported, and holds for a whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# Triton's interpreter before 3.7 cannot loop over arguments with NumPy 2.4 and newer.
PROBE = """
import torch, triton, triton.language as tl

@triton.jit
def count(out_ptr, n):
    for i in range(n):
        tl.store(out_ptr + i, i)

out = torch.zeros(3)
count[(1,)](out, 3)
assert out.tolist() == [0, 1, 2]
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_edges_in_the_interpreter(tmp_path):
    pass_in_the_interpreter(tmp_path, str(HERE / "interpreted"))


@pytest.mark.long
def test_conformance_in_the_interpreter(tmp_path):
    pass_in_the_interpreter(tmp_path, "tests/ops/test_conformance.py", "-k", "triton-cpu")


def pass_in_the_interpreter(tmp_path: Path, *arguments: str) -> None:
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments)
    if done.returncode != 0:
        probe = tmp_path / "probe.py"
        probe.write_text(PROBE)
        tried = python(str(probe))
        if tried.returncode != 0:
            reason = tried.stderr.strip().splitlines()[-1]
            pytest.skip(f"Triton's interpreter does not run with these packages: {reason}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout
