"""The columns of the CSV that say when, where and with which versions."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from datetime import datetime

import torch

from mulki import __version__
from mulki.runs.environment import environment


def describe_machine(device: str) -> dict[str, str]:
    """Card, driver, CPU, versions, commit; `capability` is the GPU's where there is one."""
    found = environment()
    commit = found["git_commit"] or ""
    gpu, capability = "", torch.backends.cpu.get_cpu_capability()
    if device != "cpu":
        gpu, capability = torch.get_device_module(device).get_device_name(device), ""
    if torch.device(device).type == "cuda":
        parts = [
            ".".join(map(str, torch.cuda.get_device_capability(device))),
            f"driver {driver}" if (driver := _driver()) else "",
            f"CUDA {torch.version.cuda}" if torch.version.cuda else f"HIP {torch.version.hip}",
        ]
        capability = ", ".join(filter(None, parts))
    return {
        "gpu_name": gpu,
        "timestamp": datetime.now().isoformat(timespec="seconds"),
        "mulki_version": __version__,
        "torch_version": torch.__version__,
        "triton_version": str(found["triton"] or ""),
        "cpu_name": str(found["cpu"]),
        "capability": capability,
        "threads": str(torch.get_num_threads()),
        "git_commit": f"{commit}, modified" if found["git_modified"] else str(commit),
    }


def setting_line(setting: Mapping[str, str]) -> str:
    """Versions and hardware, from the machine's columns of a line."""
    commit = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{28}\b", r"\1", setting["git_commit"])
    triton = f", triton {setting['triton_version']}" if setting["triton_version"] else ""
    gpu = f"{setting['gpu_name']}, " if setting["gpu_name"] else ""
    return (
        f"mulki {setting['mulki_version']} ({commit or 'no checkout'}), "
        f"torch {setting['torch_version']}{triton}; {gpu}{setting['cpu_name']}, "
        f"{setting['capability']}, threads: {setting['threads']}"
    )


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return (done.stdout.splitlines() or [""])[0].strip()
