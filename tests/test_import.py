"""`import mulki` is light, and needs nothing that is heavy or optional."""

from __future__ import annotations

import sys

import pytest

from tests import python
from tests.test_info import FORKS

HEAVY = "open_clip triton torchvision transformers timm rich jinja2 yaml PIL pandas sklearn"

#: Each runs in a process of its own that has imported torch.
LIGHT = (
    f"import mulki, sys\nassert not [m for m in '{HEAVY}'.split() if m in sys.modules]",
    # A package that is None in sys.modules cannot be imported; and no compiler is started.
    f"import sys\nsys.modules.update(dict.fromkeys('{HEAVY}'.split()))\n"
    "import subprocess, torch\n"
    "def refuse(*a, **k): raise AssertionError(a)\n"
    "subprocess.Popen.__init__ = refuse\n"
    "import mulki\n"
    "u = torch.nn.functional.normalize(torch.ones(2, 3, requires_grad=True), dim=1)\n"
    "similarity = mulki.Similarity(u, u.detach(), 10.0)\n"
    "loss = mulki.functional.prototype_cross_entropy(similarity, torch.tensor([0, 1]))\n"
    "loss.backward()\nassert float(loss) > 0",
    # The command line answers.
    "import sys\nfrom mulki.app.cli import run_command\n"
    "for words in ([], ['--help'], ['--version'], ['tasks'], ['run', '--bogus']):\n"
    "    run_command(words)\n"
    "heavy = 'open_clip triton torchvision transformers datasets'.split()\n"
    "assert not [m for m in heavy if m in sys.modules]",
    # No kernels are loaded.
    "import mulki, sys, torch\n"
    "from mulki.ops.torch_private import has_cpu_kernel\n"
    "assert torch.ops.mulki.siglip.default.has_kernel_for_dispatch_key('CUDA')\n"
    "assert not has_cpu_kernel('siglip')\n"
    "assert 'triton' not in sys.modules",
    # Nor where a Triton kernel is asked for.
    "import sys, torch\nfrom mulki.kernels import lookup\n"
    "assert lookup.why_not('siglip', 'cuda', torch.float64)\n"
    "names = [m for m in sys.modules if m == 'triton' or m.startswith('mulki.kernels.')]\n"
    "assert names == ['mulki.kernels.lookup'], names",
    # The benchmark is loaded when it is asked for, and training never.
    "import sys, mulki\n"
    "assert not [m for m in sys.modules if m.startswith('mulki.bench')]\n"
    "before = set(sys.modules)\n"
    "import mulki.bench.run\n"
    "above = 'mulki.app.cli mulki.train mulki.methods mulki.data open_clip benchmarks'\n"
    "assert not [m for m in above.split() if m in set(sys.modules) - before]",
)


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has imported torch")
def test_nothing_heavy_is_imported_or_needed() -> None:
    python("-c", FORKS, *LIGHT)


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
    python("-c", code)
