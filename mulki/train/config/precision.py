"""Device and precision of a run; precisions have the names of open_clip's --precision."""

from __future__ import annotations

import contextlib
import copy
from typing import Literal, get_args

import torch

from mulki.clip.models import VisionLanguageModel
from mulki.distributed import launch
from mulki.errors import InputError, nearest
from mulki.runs.environment import cpu_model

Name = Literal[
    "auto", "fp32", "amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16"
]
OfTests = Literal["fp32", "amp", "amp_bf16"]


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 faster than float32; elsewhere it is slower."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Without AMX a step of training took an Intel Xeon about twice as long
        # (docs/what-we-learned.md).
        return _has("amx_tile") or (_has("avx512_bf16") and "Intel" not in cpu_model())
    return False


def _has(instructions: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{instructions}_supported", bool)())


def device_of(name: str) -> torch.device:
    """The device of this process.

    Args:
        name: as the option `--device` takes it.

    Raises:
        InputError: it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Only this process's own GPU is tried: a context on the first GPU for each process would
        # fill the memory of that one.
        device = launch.device_of_process(torch.device(name))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"--device: {name} cannot be used ({reason}); try auto or cpu") from None
    return device


class Precision:
    """How encoders compute, in the names of open_clip. Features and losses are float32 throughout.

    Args:
        name: "fp32"; "amp_bf16" (also "amp_bfloat16") for autocast to bfloat16; "amp" for autocast
            to float16 with gradient scaling on a GPU (bfloat16 on a CPU); "auto" for "amp_bf16"
            where `native_bf16` says so and "fp32" elsewhere. With these the weights are float32.
            "bf16" and "fp16" store the weights in that dtype but for those of normalisations,
            "pure_bf16" and "pure_fp16" those too; small learning rates then round away.
        device: where the model is.
        cached: whether autocast keeps its copies of weights within a pass.

    Raises:
        InputError: an unknown name.
    """

    def __init__(self, name: Name, device: torch.device, *, cached: bool = True):
        if name not in get_args(Name):
            raise InputError(
                f"--precision: got {name!r}{nearest(name, get_args(Name))}, wanted one of "
                f"{', '.join(get_args(Name))}"
            )
        if name == "auto":
            name = "amp_bf16" if native_bf16(device) else "fp32"
        self.name = name
        self.device = device
        self._cached = cached
        half = name == "amp" and device.type == "cuda"
        self.dtype = torch.float16 if half or name.endswith("fp16") else torch.bfloat16
        self._stored = name in ("bf16", "fp16", "pure_bf16", "pure_fp16")
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """The context in which encoders run."""
        if self.name == "fp32" or self._stored:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype, cache_enabled=self._cached)

    def convert(self, model: VisionLanguageModel) -> None:
        """Give the weights of a model, loaded as float32, the dtype they are stored in."""
        if self._stored:
            model.store(self.dtype, norms=self.name.startswith("pure_"))


def as_tested(model: VisionLanguageModel, name: OfTests | None) -> VisionLanguageModel:
    """The same model, whose towers compute as ``--precision-eval`` says."""
    same = copy.copy(model)
    # Each weight is used once in a pass, so that its copy is not kept.
    same.autocast = Precision(name or "fp32", model.device, cached=False).autocast
    return same
