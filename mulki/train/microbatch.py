"""Gradient caching: the exact gradients of one large batch, encoded in micro-batches.

A contrastive loss couples all samples of a batch, so adding up the gradients of small batches is
another loss. Gradient caching (Gao et al., arXiv 2101.06983) splits the chain rule at the features:

1. encode every micro-batch without a graph and keep the features, B x D numbers;
2. compute the loss on all of them, and its gradients with respect to them;
3. encode every micro-batch again, with a graph, and send its part of those gradients back.

Memory for activations is that of one micro-batch, whatever B is; the price is a second forward pass
(a third more encoder work in a step, where a backward pass costs two forward passes). In your own
training loop:

    from mulki.train.microbatch import backward

    value = backward(lambda out: loss(**out), (model, images, texts), micro_batch=64)
    optimizer.step()

where `model(images, texts)` returns a dict with the features and the logit scale, as open_clip's
models do with ``output_dict=True``.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from mulki.train.randomness import random_state, set_random_state

Loss = Callable[..., "Tensor | Mapping[str, Tensor]"]


@dataclass(frozen=True)
class Encoder:
    """A function of a batch, and the batch.

    Args:
        function: from micro-batches of `inputs` to features: a tensor, or a tuple, list or dict of
            them. Tensors of two and more dimensions have a row per sample; scalars and vectors
            (logit scale and bias) belong to the whole batch and must not depend on the samples.
        inputs: tensors with one row per sample. They may stay in the host's memory, where
            `function` moves what it gets to its device.
        split: False for what belongs to the whole batch, such as the class texts: it is encoded
            once a step, with its graph, and never again.
        micro_batch: samples encoded at a time, where this encoder has another number of samples
            than the others; by default that of `backward`.
    """

    function: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    split: bool = True
    micro_batch: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inputs, tuple):
            raise TypeError(
                f"inputs: got {type(self.inputs).__name__}, wanted a tuple of tensors; write (x,) "
                f"for one tensor x"
            )


def backward(
    loss: Loss,
    *encoders: Encoder | Sequence[Any],
    micro_batch: int | None,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor | dict[str, Tensor]:
    """The loss of the whole batch; its gradients are added to ``.grad`` of the parameters.

    They equal those of ``loss(function(inputs)).backward()`` on the whole batch to rounding. That
    includes the gradient of a logit scale, which a sum over micro-batches would count once for
    each. Dropout and other randomness are the same in both passes.

    - Autocast: call this inside the context.
    - GradScaler: pass it as `scaler`; unscale, step and update it as usual.
    - DistributedDataParallel: pass the wrapped module as the function of a single encoder. Its
      gradients are reduced once a step. All ranks have to split their batch, or none.
    - FSDP2: gradients are reduced with every micro-batch, since keeping them whole until the last
      one would need the memory that sharding saves. All ranks need the same number of
      micro-batches.
    - Activation checkpointing and torch.compile work inside the encoders as usual.

    Args:
        loss: from the outputs of the encoders, in their order, to a scalar, or to a dict of scalars
            whose sum is minimised.
        encoders: each an `Encoder`, or ``(function, *inputs)`` for one that is split.
        micro_batch: samples encoded at a time; None, or as many as there are or more, for all of
            them, without a second pass.
        scaler: multiplies the loss before its backward pass.

    Returns:
        What `loss` returned, detached.

    Raises:
        TypeError, ValueError: naming the argument; an output of an encoder that is neither one row
            per sample nor the same for all micro-batches is one of `encoders`.
    """
    towers = [_encoder(e, place) for place, e in enumerate(encoders)]
    _check(towers, micro_batch)
    passes = [_Pass(t, _size(t, micro_batch), place) for place, t in enumerate(towers)]
    cached = [p for p in passes if p.cached]
    with _synchronised(towers, last=not cached):
        value = loss(*[p.first() for p in passes])
        terms = _terms(value)
        total = torch.stack([term.reshape(()) for term in terms.values()]).sum()
        with _without_autocast(towers):
            (total if scaler is None else scaler.scale(total)).backward()
    for of_tower in cached:
        of_tower.second()
    detached = {name: term.detach() for name, term in terms.items()}
    return detached if isinstance(value, Mapping) else detached[""]


def _encoder(given: Encoder | Sequence[Any], place: int) -> Encoder:
    if isinstance(given, Encoder):
        return given
    # nn.Sequential can be indexed too, so only tuples and lists are accepted.
    if not isinstance(given, (tuple, list)) or not given:
        raise TypeError(
            f"encoders[{place}]: got {type(given).__name__}, wanted an Encoder or (function, "
            f"*inputs)"
        )
    return Encoder(given[0], tuple(given[1:]))


def _size(tower: Encoder, micro_batch: int | None) -> int | None:
    return micro_batch if tower.micro_batch is None else tower.micro_batch


def _terms(value: Any) -> dict[str, Tensor]:
    terms = dict(value) if isinstance(value, Mapping) else {"": value}
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.numel() != 1:
            came = f"shape {list(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            where = f" for {name!r}" if name else ""
            raise TypeError(f"loss: returned {came}{where}, wanted a scalar tensor")
    if not terms:
        raise TypeError("loss: returned an empty dict, wanted at least one scalar")
    return terms


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
            size = _size(tower, micro_batch)
            if size is not None and size < 1:
                raise ValueError(f"micro_batch: got {size}, wanted at least 1")
            if tower.micro_batch is None:
                if rows is not None and rows != sizes[0]:
                    raise ValueError(
                        f"encoders[{place}]: got {sizes[0]} samples beside {rows}; use "
                        f"Encoder(..., split=False) for what is not one per sample, or "
                        f"Encoder(..., micro_batch=n) for another batch"
                    )
                rows = sizes[0]
            several = size is not None and size < sizes[0]
            if several and any(x.grad_fn is not None for x in tower.inputs):
                raise ValueError(
                    f"encoders[{place}]: got inputs that were computed with gradients, through "
                    f"which each micro-batch would go back; move that into its function, or detach "
                    f"them"
                )
            if several:
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

    def __init__(self, tower: Encoder, micro_batch: int | None, place: int):
        self.tower = tower
        self._name = f"encoders[{place}]"
        rows = len(tower.inputs[0])
        self.cached = tower.split and micro_batch is not None and micro_batch < rows
        self._chunks: list[tuple[Tensor, ...]] = [tower.inputs]
        if self.cached and micro_batch is not None:
            self._chunks = list(zip(*[x.split(micro_batch) for x in tower.inputs], strict=True))
        self._states: list[tuple[list[Any], list[torch.device]]] = []
        self._leaves: list[Tensor] = []

    def first(self) -> Any:
        if not self.cached:
            return self.tower.function(*self.tower.inputs)
        outputs = []
        with torch.no_grad():
            for chunk in self._chunks:
                devices = [*({x.device for x in chunk} | _accelerator())]
                self._states.append((random_state(*devices), devices))
                flat, form = pytree.tree_flatten(self.tower.function(*chunk))
                outputs.append(flat)
        if len({len(flat) for flat in outputs}) > 1:
            raise ValueError(f"{self._name}: its outputs are more for some micro-batches")
        joined = []
        for parts in zip(*outputs, strict=True):
            value = parts[-1]
            if isinstance(value, Tensor):
                self._check(parts)
                value = torch.cat(parts) if value.ndim >= 2 else value.detach().clone()
                if value.is_floating_point():
                    self._leaves.append(value.requires_grad_())
            joined.append(value)
        return pytree.tree_unflatten(joined, form)

    def _check(self, parts: Sequence[Tensor]) -> None:
        rows = [len(chunk[0]) for chunk in self._chunks]
        shapes = [list(part.shape) for part in parts]
        if parts[0].ndim >= 2:
            if [shape[0] for shape in shapes] != rows:
                raise ValueError(
                    f"{self._name}: got an output of shape {shapes[0]} for {rows[0]} samples, "
                    f"wanted a row for each; use Encoder(..., split=False) for what is not one per "
                    f"sample"
                )
            return
        # A comparison waits for a GPU, so it is done there only for outputs whose length suggests
        # one number per sample.
        suspect = parts[0].numel() > 1 and shapes[0] == rows[:1]
        compared = suspect or parts[0].device.type == "cpu"
        if any(shape != shapes[0] for shape in shapes) or (
            compared and not all(_same(part, parts[0]) for part in parts)
        ):
            raise ValueError(
                f"{self._name}: an output of shape {shapes[0]} is not the same for all "
                f"micro-batches; give what is one per sample two dimensions, [n, 1], and compute "
                f"what depends on all samples in the loss"
            )

    def second(self) -> None:
        last = len(self._chunks) - 1
        rows, others = self._repeat(0)
        # A frozen encoder needs no backward pass. If only outputs of the whole batch train (such as
        # the logit scale), the last micro-batch is enough.
        if rows or others:
            for place in range(1 if rows else last, last + 1):
                self._repeat(place)

    def _repeat(self, place: int) -> tuple[bool, bool]:
        # Returns whether gradients flow into outputs per sample, and into other outputs.
        chunk, final = self._chunks[place], place == len(self._chunks) - 1
        start = sum(len(c[0]) for c in self._chunks[:place])
        with _synchronised([self.tower], last=final), _repeated(*self._states[place]):
            flat = pytree.tree_leaves(self.tower.function(*chunk))
            floats = [v for v in flat if isinstance(v, Tensor) and v.is_floating_point()]
            outputs, gradients = [], []
            for output, leaf in zip(floats, self._leaves, strict=True):
                if not output.requires_grad or (leaf.ndim < 2 and not final):
                    continue
                grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                outputs.append(output)
                gradients.append(grad[start : start + len(chunk[0])] if leaf.ndim >= 2 else grad)
            if outputs:
                with _without_autocast([self.tower]):
                    torch.autograd.backward(outputs, gradients)
        trained = [output.ndim >= 2 for output in floats if output.requires_grad]
        return any(trained), not all(trained)


def _same(one: Tensor, other: Tensor) -> bool:
    return torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))


@contextlib.contextmanager
def _repeated(state: Sequence[Any], devices: Sequence[torch.device]) -> Iterator[None]:
    # Draws in the block what was drawn after `state` was taken.
    after = random_state(*devices)
    set_random_state(state, *devices)
    try:
        yield
    finally:
        set_random_state(after, *devices)


def _accelerator() -> set[torch.device]:
    # The device to which an encoder may move inputs from the host; none before its first use.
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or not getattr(torch.get_device_module(kind), "is_initialized", lambda: True)():
        return set()
    return {torch.device(kind.type, torch.accelerator.current_device_index())}


def _replicas(towers: Sequence[Encoder]) -> list[nn.parallel.DistributedDataParallel]:
    replicated = nn.parallel.DistributedDataParallel
    return [t.function for t in towers if isinstance(t.function, replicated)]


@contextlib.contextmanager
def _synchronised(towers: Sequence[Encoder], *, last: bool) -> Iterator[None]:
    # DistributedDataParallel reduces gradients in the backward pass of a forward pass that ran with
    # synchronisation on: here, only of the last one.
    with contextlib.ExitStack() as stack:
        for replica in _replicas(towers):
            if not last:
                stack.enter_context(replica.no_sync())
        yield


@contextlib.contextmanager
def _without_autocast(towers: Sequence[Encoder]) -> Iterator[None]:
    # torch does not define backward passes under autocast.
    with contextlib.ExitStack() as stack:
        kinds = {x.device.type for tower in towers for x in tower.inputs}
        for device in kinds | {device.type for device in _accelerator()}:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield
