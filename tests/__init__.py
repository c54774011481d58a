"""Tests of `mulki`, `kernels` and `benchmarks`, in the same folders as the code."""

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
