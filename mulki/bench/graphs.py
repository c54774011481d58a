"""A call as a CUDA graph: captured once, replayed by a single launch."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_WARM_UP = 3  # calls before the capture, in which kernels are compiled and chosen


class Replay(NamedTuple):
    """A captured call."""

    replay: Callable[[], object]
    outputs: tuple[Tensor, ...]  # what the last replay computed; the next one overwrites it


def capture(call: Callable[[], tuple[Tensor, ...]], device: str) -> Replay:
    """Capture `call`, which must read nothing on the host, on the device.

    As torch asks for it, the call first runs on a side stream.
    """
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        side = torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                call()
        stream.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
    return Replay(graph.replay, outputs)
