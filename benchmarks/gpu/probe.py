"""What this machine has, as JSON; in a process of its own, so that no other one holds a GPU.

python -m benchmarks.gpu.probe
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")


@dataclass(frozen=True)
class Machine:
    """What the steps depend on."""

    device: str  # in words
    no_gpu: str | None  # why the kernels cannot run here, None if they can
    sanitizer: str | None  # the path of compute-sanitizer
    no_figures: str | None  # why no figures are drawn


def probe() -> Machine:
    """Look."""
    os.environ["MULKI_BACKEND"] = "triton"
    import torch

    from mulki import kernels

    here = torch.cuda.is_available()
    return Machine(
        device=torch.cuda.get_device_name() if here else "no GPU",
        no_gpu=kernels.why_not("teacher_kl", "cuda", torch.float32)
        if here
        else "torch finds no GPU on this machine",
        sanitizer=_sanitizer(),
        no_figures=None if find_spec("matplotlib") else "matplotlib is not installed",
    )


def _sanitizer() -> str | None:
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    homes = [os.environ.get("CUDA_HOME", ""), *_TOOLKITS]
    paths = [Path(home) / "bin" / "compute-sanitizer" for home in homes if home]
    return next((str(path) for path in paths if path.is_file()), None)


if __name__ == "__main__":
    print(json.dumps(asdict(probe())))
