"""What a result depends on besides its configuration: versions, hardware, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

from mulki.distributed.torchrun import launcher

# The package names under which each is published; Triton has one per backend.
_PACKAGES: dict[str, tuple[str, ...]] = {
    "open_clip": ("open_clip_torch",),
    "mulki": ("mulki",),
    "numpy": ("numpy",),
    "triton": ("triton", "pytorch-triton", "pytorch-triton-rocm", "triton-windows"),
}


def environment(hashes: Mapping[str, object] | None = None) -> dict[str, object]:
    """Return what a result depends on besides its configuration, for ``env.json``.

    ``hashes`` (of weights, splits, prompts, ...) is stored as given. A package that is not
    installed is ``None``, and so is the commit outside a checkout.
    """
    # Imported here: torch takes seconds to import, and reading results does not need it.
    import torch

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build (+cu126), which package metadata may lack
        **{name: _version(distributions) for name, distributions in _PACKAGES.items()},
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": _processes(),
        "started_by": launcher(),
        "cuda": torch.version.cuda,
        "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        **git_state(Path(__file__).resolve().parents[2]),
        "hashes": dict(hashes or {}),
    }


def cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def changes_since(known: Mapping[str, object]) -> list[str]:
    """What of all that rounds results is not as in an ``env.json``: "threads: 2, before 4"."""
    now = environment()
    names = ("mulki", "torch", "open_clip", "cpu", "threads", "cuda", "devices")
    return [
        f"{name}: {now[name]}, before {known[name]}"
        for name in names
        if name in known and known[name] != now[name]
    ]


def _processes() -> int:
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _version(distributions: tuple[str, ...]) -> str | None:
    for distribution in distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def cpu_model() -> str:
    """What the CPU calls itself."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        cpuinfo = ""
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, flags=re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def git_state(root: Path) -> dict[str, object]:
    """Commit of the checkout at ``root`` and whether it has changes; None where there is none."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        # An installed package may lie inside the checkout of another project.
        if Path(git("rev-parse", "--show-toplevel")).resolve() == root:
            modified = bool(git("status", "--porcelain", "--untracked-files=no"))
            return {"git_commit": git("rev-parse", "HEAD"), "git_modified": modified}
    except (OSError, subprocess.SubprocessError):
        pass
    return {"git_commit": None, "git_modified": None}
