"""Precision: the names of open_clip's --precision, as contexts."""

from __future__ import annotations

import contextlib
from typing import Literal

import torch

Name = Literal["auto", "fp32", "amp", "amp_bf16", "amp_bfloat16"]


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
        return any(getattr(torch.cpu, check, bool)() for check in checks)
    return False


class Precision:
    """How encoders compute. Features, losses and weights are float32 throughout.

    Args:
        name: "fp32"; "amp_bf16" (also "amp_bfloat16") for autocast to bfloat16; "amp" for autocast
            to float16 with gradient scaling on a GPU (bfloat16 on a CPU); "auto" for "amp_bf16"
            where bf16 is native and "fp32" elsewhere.
        device: where the model is.
    """

    def __init__(self, name: Name, device: torch.device):
        if name == "auto":
            name = "amp_bf16" if native_bf16(device) else "fp32"
        self.name = name
        self.device = device
        half = name == "amp" and device.type == "cuda"
        self.dtype = torch.float16 if half else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which encoders run."""
        if self.name == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)
