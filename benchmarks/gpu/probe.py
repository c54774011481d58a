"""What this machine has, as JSON; in a process of its own, so that no other one holds a GPU.

python -m benchmarks.gpu.probe [--rehearse]
"""

from __future__ import annotations

import inspect
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

MODES = ("consan", "fpsan")  # Triton's own sanitizers
_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")


@dataclass(frozen=True)
class Machine:
    """What the steps depend on."""

    device: str  # in words
    no_gpu: str | None  # why the kernels cannot run here, None if they can
    sanitizer: str | None  # the path of compute-sanitizer
    no_figures: str | None  # why no figures are drawn
    instrumented: tuple[str, ...] = ()  # modes of instrumentation that Triton has for this GPU
    rehearsal: bool = False  # with Triton's interpreter, and no GPU


def probe(rehearse: bool) -> Machine:
    """Look."""
    os.environ["MULKI_BACKEND"] = "triton"
    if rehearse:
        os.environ["TRITON_INTERPRET"] = "1"
    import torch

    from mulki.bench.plots import NEEDED
    from mulki.kernels import lookup

    absent = next((name for name in NEEDED if find_spec(name) is None), None)
    no_figures = f"{absent} is not installed" if absent else None
    if rehearse:
        reason = lookup.why_not("siglip", "cpu", torch.float32) or _not_interpreted()
        return Machine("no GPU, a rehearsal", reason, None, no_figures, rehearsal=True)
    here = torch.cuda.is_available()
    no_gpu: str | None = "torch finds no GPU on this machine"
    if here:
        no_gpu = lookup.why_not("teacher_kl", "cuda:0", torch.float32)
    return Machine(
        device=torch.cuda.get_device_name() if here else "no GPU",
        no_gpu=no_gpu,
        sanitizer=_sanitizer(),
        no_figures=no_figures,
        instrumented=() if no_gpu else instrumented(_architecture()),
    )


def _not_interpreted() -> str | None:
    import torch

    from mulki.kernels.lookup import kernel
    from mulki.ops.operators import OPERATORS, Request

    operands = torch.ones(3, 4), torch.ones(3, 4), torch.tensor(1.0)
    x, request = OPERATORS["similarity"].arguments(*operands), Request(None, "none", [False] * 3)
    try:
        kernel("similarity")(x, request)
    # Triton's interpreter and NumPy do not work together in all versions.
    except Exception as error:
        return f"Triton's interpreter does not run here: {error}".splitlines()[0]
    return None


def instrumented(architecture: str) -> tuple[str, ...]:
    """Triton ignores a mode that it has not for a GPU, so its compiler is asked beforehand."""
    name = "amd" if architecture.startswith("gfx") else "nvidia"
    compiler = import_module(f"triton.backends.{name}.compiler")
    source = inspect.getsource(compiler)
    # AMD's compiler says so by a function for each mode.
    return tuple(
        mode
        for mode in MODES
        if f'"{mode}"' in source
        and getattr(compiler, f"is_{mode}_supported", lambda _: True)(architecture)
    )


def _architecture() -> str:
    import torch

    from mulki.kernels import common

    return common.architecture(torch.device("cuda:0"))


def _sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    homes = [os.environ.get("CUDA_HOME", ""), *_TOOLKITS]
    paths = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    return next((str(path) for path in paths if path.is_file()), None)


if __name__ == "__main__":
    print(json.dumps(asdict(probe("--rehearse" in sys.argv[1:]))))
