"""Tests of `mulki`, `kernels` and `benchmarks`, in the same folders as the code."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"


def project_files(*patterns: str) -> list[Path]:
    """The files of the project as git knows them, sorted; with patterns, those that fit one.

    A folder also holds what runs, builds and environments leave in it: listing it would find those.

    Args:
        patterns: from ROOT, as "docs/*.md" or "mulki/**/*.py".
    """
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--"]
    listed = subprocess.run(
        [*listing, *(f":(glob){pattern}" for pattern in patterns)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    # A file that was deleted or moved is listed until that is committed.
    return sorted(ROOT / name for name in set(listed.split("\0")) if (ROOT / name).is_file())


def python(*arguments: str, cwd: Path = ROOT, **variables: str) -> str:
    """What a new interpreter prints, which ends without an error."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
