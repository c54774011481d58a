"""`import mulki` is light, and needs nothing that is heavy or optional."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HEAVY = "open_clip triton torchvision transformers timm rich jinja2 yaml PIL pandas sklearn"


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_heavy_is_imported() -> None:
    code = f"import mulki, sys\nprint([m for m in '{HEAVY}'.split() if m in sys.modules])"
    assert python(code).strip() == "[]"


def test_torch_is_imported_when_it_is_needed() -> None:
    code = (
        "import sys\nfrom mulki.app.cli import run_command\n"
        "assert [run_command(words) for words in ([], ['--help'], ['--version'])] == [0] * 3\n"
        "assert not {'torch', 'numpy'} & sys.modules.keys()\n"
        "import mulki\n"
        "assert mulki.functional.teacher_kl and mulki.losses.ClipLoss and mulki.Similarity\n"
        "from mulki import *\nassert Similarity is mulki.Similarity and run is mulki.run\n"
        "assert mulki.load.__module__ == mulki.run.__module__ == 'mulki.train.model'"
    )
    python(code)


def test_works_where_the_optional_packages_are_missing() -> None:
    """A package that is None in sys.modules cannot be imported; and no compiler is started."""
    # torch asks the system for libraries, in a process of its own where it is built for CUDA.
    code = (
        f"import sys\nsys.modules.update(dict.fromkeys('{HEAVY}'.split()))\n"
        "import subprocess, torch\n"
        "def refuse(*a, **k): raise AssertionError(a)\n"
        "subprocess.Popen.__init__ = refuse\n"
        "import mulki\n"
        "u = torch.nn.functional.normalize(torch.ones(2, 3, requires_grad=True), dim=1)\n"
        "similarity = mulki.Similarity(u, u.detach(), 10.0)\n"
        "loss = mulki.functional.prototype_cross_entropy(similarity, torch.tensor([0, 1]))\n"
        "loss.backward()\nprint(float(loss) > 0)"
    )
    assert python(code).strip() == "True"


def test_the_command_line_answers_without_open_clip() -> None:
    code = (
        "import sys\nfrom mulki.app.cli import run_command\n"
        "for words in ([], ['--help'], ['--version'], ['tasks'], ['run', '--bogus']):\n"
        "    run_command(words)\n"
        "heavy = 'open_clip triton torchvision transformers datasets'.split()\n"
        "assert not [m for m in heavy if m in sys.modules]"
    )
    python(code)
