"""Gradient caching: the exact gradients of one large batch, encoded in micro-batches.

A contrastive loss couples all samples of a batch, so adding up the gradients of small batches is
another loss. Gradient caching (Gao et al., arXiv 2101.06983) splits the chain rule at the features:

1. encode every micro-batch without a graph and keep the features, B x D numbers;
2. compute the loss on all of them, and its gradients with respect to them;
3. encode every micro-batch again, with a graph, and send its part of those gradients back.

Memory for activations is that of one micro-batch, whatever B is; the price is a second forward pass
(a third of a step's encoder work, where backward costs two forwards). In a loop of one's own:

    from mulki.engine.microbatch import backward

    value = backward(lambda out: loss(**out), (model, images, texts), micro_batch=64)
    optimizer.step()

where `model(images, texts)` returns a dict with the features and the logit scale, as open_clip's
models do with ``output_dict=True``.
"""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Loss = Callable[..., "Tensor | Mapping[str, Tensor]"]


@dataclass(frozen=True)
class Encoder:
    """A function of a batch, and the batch.

    Args:
        function: from micro-batches of `inputs` to features: a tensor, or a tuple, list or dict of
            them. Tensors of two and more dimensions have a row per sample; scalars and vectors
            (logit scale and bias) belong to the whole batch and must not depend on the samples.
        inputs: tensors with one row per sample.
        split: False for what belongs to the whole batch, such as the class texts: it is encoded
            once a step, with its graph, and never again.
    """

    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    split: bool = True


def backward(
    loss: Loss,
    *encoders: Encoder | Sequence[Any],
    micro_batch: int | None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor | dict[str, Tensor]:
    """The loss of the whole batch; its gradients are added to ``.grad`` of all that made it.

    They equal those of ``loss(function(inputs)).backward()`` on the whole batch to rounding, those
    of a logit scale included (adding up the losses of cached micro-batches would count it once for
    each). Dropout and other randomness of the second pass repeat the first.

    - Autocast: call this inside the context.
    - GradScaler: pass it as `scaler`; unscale, step and update it as always.
    - DistributedDataParallel: pass the wrapped module as the function of a single encoder. Its
      gradients are reduced once a step.
    - FSDP2: sharded gradients are reduced with every micro-batch, since keeping whole ones until
      the last would need the memory that sharding saves.
    - Activation checkpointing and torch.compile work inside the encoders as always.

    Args:
        loss: from the outputs of the encoders, in their order, to a scalar, or to a dict of scalars
            whose sum is minimised.
        encoders: each an `Encoder`, or ``(function, *inputs)`` for one that is split.
        micro_batch: samples encoded at a time; None for all of them, without a second pass.
        scaler: multiplies the loss before its backward pass.

    Returns:
        What `loss` returned, detached.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    towers = [e if isinstance(e, Encoder) else Encoder(e[0], tuple(e[1:])) for e in encoders]
    _check(towers, micro_batch)
    passes = [_Pass(tower, micro_batch) for tower in towers]
    cached = [p for p in passes if p.cached]
    with _synchronised(towers, last=not cached):
        value = loss(*[p.first() for p in passes])
        terms = dict(value) if isinstance(value, Mapping) else {"": value}
        total = torch.stack([term.reshape(()) for term in terms.values()]).sum()
        with _without_autocast(towers):
            (total if scaler is None else scaler.scale(total)).backward()
    for of_tower in cached:
        of_tower.second()
    detached = {name: term.detach() for name, term in terms.items()}
    return detached if isinstance(value, Mapping) else detached[""]


def _check(towers: Sequence[Encoder], micro_batch: int | None) -> None:
    if not towers:
        raise ValueError("encoders: got none, wanted at least one")
    if isinstance(micro_batch, bool) or not isinstance(micro_batch, (int, type(None))):
        raise TypeError(f"micro_batch: got {type(micro_batch).__name__}, wanted an int or None")
    rows = None
    for place, tower in enumerate(towers):
        if not callable(tower.function):
            raise TypeError(
                f"encoders[{place}]: got {type(tower.function).__name__} as its function, wanted "
                f"something to call on the inputs"
            )
        if not tower.inputs or not all(isinstance(x, Tensor) and x.ndim for x in tower.inputs):
            raise TypeError(f"encoders[{place}]: wanted inputs that are tensors with rows")
        sizes = [len(x) for x in tower.inputs]
        if len(set(sizes)) > 1:
            raise ValueError(
                f"encoders[{place}]: got inputs of {', '.join(map(str, sizes))} rows, wanted one "
                f"row per sample in each"
            )
        if sizes[0] == 0:
            raise ValueError(f"encoders[{place}]: got no samples, wanted at least one")
        if tower.split:
            if micro_batch is not None and not 1 <= micro_batch <= sizes[0]:
                raise ValueError(
                    f"micro_batch: got {micro_batch}, wanted at least 1 and at most the batch, "
                    f"{sizes[0]}"
                )
            if rows is not None and rows != sizes[0]:
                raise ValueError(
                    f"encoders[{place}]: got {sizes[0]} samples beside {rows}; use "
                    f"Encoder(..., split=False) for what is not one per sample"
                )
            rows = sizes[0]
            if micro_batch is not None and micro_batch < sizes[0]:
                _warn_of_batch_statistics(tower.function)
    if _replicas(towers) and len(towers) > 1:
        raise ValueError(
            "encoders: got DistributedDataParallel beside another encoder; it reduces its "
            "gradients in one backward pass, so pass one encoder whose forward returns all features"
        )


def _warn_of_batch_statistics(function: Any) -> None:
    module = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
    if isinstance(module, nn.Module) and any(
        isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training for m in module.modules()
    ):
        warnings.warn(
            "a batch normalisation is in training mode: it normalises each micro-batch by its own "
            "statistics, so gradients are not those of the whole batch; call eval() on it",
            stacklevel=4,
        )


class _Pass:
    """The two passes of one encoder."""

    def __init__(self, tower: Encoder, micro_batch: int | None):
        self.tower = tower
        rows = len(tower.inputs[0])
        self.cached = tower.split and micro_batch is not None and micro_batch < rows
        self._chunks: list[tuple[Tensor, ...]] = [tower.inputs]
        if self.cached and micro_batch is not None:
            self._chunks = list(zip(*[x.split(micro_batch) for x in tower.inputs], strict=True))
        self._states: list[_Randomness] = []
        self._leaves: list[Tensor] = []

    def first(self) -> Any:
        if not self.cached:
            return self.tower.function(*self.tower.inputs)
        outputs = []
        with torch.no_grad():
            for chunk in self._chunks:
                self._states.append(_Randomness.now(chunk))
                flat, form = pytree.tree_flatten(self.tower.function(*chunk))
                outputs.append(flat)
        joined = []
        for parts in zip(*outputs, strict=True):
            value = parts[-1]
            if isinstance(value, Tensor):
                value = torch.cat(parts) if value.ndim >= 2 else value.detach().clone()
                if value.is_floating_point():
                    self._leaves.append(value.requires_grad_())
            joined.append(value)
        return pytree.tree_unflatten(joined, form)

    def second(self) -> None:
        starts = [0]
        for chunk in self._chunks:
            starts.append(starts[-1] + len(chunk[0]))
        for place, chunk in enumerate(self._chunks):
            final = place == len(self._chunks) - 1
            with _synchronised([self.tower], last=final), self._states[place].repeated():
                flat = pytree.tree_leaves(self.tower.function(*chunk))
                floats = [v for v in flat if isinstance(v, Tensor) and v.is_floating_point()]
                outputs, gradients = [], []
                for output, leaf in zip(floats, self._leaves, strict=True):
                    if not output.requires_grad or (leaf.ndim < 2 and not final):
                        continue
                    grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                    outputs.append(output)
                    gradients.append(
                        grad[starts[place] : starts[place + 1]] if leaf.ndim >= 2 else grad
                    )
                if outputs:
                    with _without_autocast([self.tower]):
                        torch.autograd.backward(outputs, gradients)


@dataclass(frozen=True)
class _Randomness:
    """States of the generators of torch, NumPy and Python."""

    cpu: Tensor
    devices: Mapping[torch.device, Tensor]
    numpy: Any = field(repr=False)
    python: Any = field(repr=False)

    @classmethod
    def now(cls, tensors: Sequence[Tensor]) -> _Randomness:
        used = {t.device for t in tensors if t.device.type != "cpu"}
        devices = {d: torch.get_device_module(d).get_rng_state(d) for d in used}
        return cls(torch.get_rng_state(), devices, np.random.get_state(), random.getstate())

    def _restore(self) -> None:
        torch.set_rng_state(self.cpu)
        for device, state in self.devices.items():
            torch.get_device_module(device).set_rng_state(state, device)
        np.random.set_state(self.numpy)
        random.setstate(self.python)

    @contextlib.contextmanager
    def repeated(self) -> Iterator[None]:
        after = self.now([torch.empty(0, device=device) for device in self.devices])
        self._restore()
        try:
            yield
        finally:
            after._restore()


def _replicas(towers: Sequence[Encoder]) -> list[nn.parallel.DistributedDataParallel]:
    replicated = nn.parallel.DistributedDataParallel
    return [t.function for t in towers if isinstance(t.function, replicated)]


@contextlib.contextmanager
def _synchronised(towers: Sequence[Encoder], *, last: bool) -> Iterator[None]:
    # DistributedDataParallel reduces in the backward pass of a forward made with synchronisation
    # on: in the last one alone.
    with contextlib.ExitStack() as stack:
        for replica in _replicas(towers):
            if not last:
                stack.enter_context(replica.no_sync())
        yield


@contextlib.contextmanager
def _without_autocast(towers: Sequence[Encoder]) -> Iterator[None]:
    # What autocast would do to a backward pass is not defined.
    with contextlib.ExitStack() as stack:
        for device in {x.device.type for tower in towers for x in tower.inputs}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
