"""What tells in which directions weights may change: mean gradients, and moments of inputs.

Both are of the weights with adapters, over a task's training images and its class texts, with the
evaluation transform and without autocast.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mulki.clip.models.adapters import Adapted
from mulki.clip.texts import text_inputs
from mulki.data.loader import batch_sizes, batches
from mulki.distributed.collectives import sum_of_ranks
from mulki.errors import InputError
from mulki.train.learning.inputs import TaskInputs, Training

_log = logging.getLogger(__name__)

# Images at a time with --micro-batch auto: few, since gradients of weights are kept beside them.
_WITH_AUTO = 16


def mean_gradients(training: Training, inputs: TaskInputs) -> dict[str, Tensor]:
    """The gradient of the mean cross-entropy over the task's training images.

    Args:
        training: with the weights as they are at the task's start.
        inputs: of the task.

    Returns:
        [out, in] in float32 for each weight with an adapter, by its name.

    Raises:
        InputError: gradients that are not finite.
    """
    model = training.model
    adapted = _adapted(training)
    weights = {name: each.frozen for name, each in adapted.items()}
    model.eval()
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        sums = {n: torch.zeros_like(w, dtype=torch.float32) for n, w in weights.items()}
        texts = model.encode_texts(text_inputs(model, inputs.prompts, training.world))
        leaf = texts.detach().requires_grad_(texts.requires_grad)
        of_texts = torch.zeros_like(leaf)
        count = len(inputs.task.train)
        for images, target in _images(training, inputs):
            logits = model.logit_scale * model.encode_images(images) @ leaf.mT
            loss = F.cross_entropy(logits, target, reduction="sum") / count
            *found, of_leaf = _gradients(loss, [*weights.values(), leaf])
            _add(sums, found)
            if of_leaf is not None:
                of_texts += of_leaf
        if texts.requires_grad:
            # `of_texts` is of the images of this process alone.
            _add(sums, _gradients((texts * of_texts).sum(), [*weights.values()]))
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    for name in sums:
        sums[name] = sum_of_ranks(sums[name]).flatten(1)
    if bad := [name for name, value in sums.items() if not value.isfinite().all()]:
        raise InputError(
            f"--precision {training.precision.name}: the gradient of {bad[0]} is not finite over "
            f"the images of task {inputs.task.name}; pass fp32, or other weights to start from"
        )
    return sums


def _gradients(loss: Tensor, of: list[Any]) -> list[Tensor | None]:
    wanted = [each for each in of if each.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
    return [next(found) if each.requires_grad else None for each in of]


def _add(sums: dict[str, Tensor], found: list[Tensor | None]) -> None:
    for total, gradient in zip(sums.values(), found, strict=True):
        if gradient is not None:
            total += gradient


@torch.no_grad()
def input_moments(training: Training, inputs: TaskInputs) -> dict[str, Tensor]:
    """The sums of ``x x^T`` over all inputs x of each weight with an adapter.

    Args:
        training: with the weights as they are after the task's steps.
        inputs: of the task.

    Returns:
        [in, in] in float32 for each weight with an adapter, by its name.
    """
    model, world = training.model, training.world
    adapted = _adapted(training)
    sums: dict[str, Tensor] = {}

    def add(name: str, rows: Tensor) -> None:
        rows = rows.float()
        sums[name] = sums.get(name, 0.0) + rows.mT @ rows

    model.eval()
    texts = text_inputs(model, inputs.prompts, world)
    with _listening(model.clip, adapted, add):
        if world.main:
            model.encode_texts(texts)
        for images, _ in _images(training, inputs):
            model.encode_images(images)
    for name, each in adapted.items():
        width = each.a.shape[1]
        total = sums.pop(name, torch.zeros(width, width, device=model.device))
        sums[name] = sum_of_ranks(total)
    if unseen := [name for name, total in sums.items() if not total.any()]:
        _log.warning(
            "no inputs were seen of %s, so nothing protects them from later tasks",
            ", ".join(unseen),
        )
    return sums


@contextlib.contextmanager
def _listening(
    clip: nn.Module, adapted: dict[str, Adapted], add: Callable[[str, Tensor], None]
) -> Iterator[None]:
    # Calls `add` with the name of each weight and its inputs as rows [n, in].
    by_module = {id(each.module): name for name, each in adapted.items()}
    handles = []
    for module in clip.modules():
        name = by_module.get(id(module))
        hook = None if name is None else _of_layer(name, add)
        if isinstance(module, nn.MultiheadAttention):
            # Its output projection is a function's argument, no module that is called.
            of_output = by_module.get(id(module.out_proj))
            hook = _of_attention(name, of_output, add) if name or of_output else None
        if hook is not None:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_layer(name: str, add: Callable[[str, Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, given: tuple[Any, ...], more: dict[str, Any]) -> None:
        inputs = given[0] if given else more["input"]
        if isinstance(module, nn.Conv2d):
            down, across = module.stride
            inputs = inputs[:, :, ::down, ::across].movedim(1, -1)
        add(name, inputs.reshape(-1, inputs.shape[-1]))

    return hook


def _of_attention(
    name: str | None, of_output: str | None, add: Callable[[str, Tensor], None]
) -> Callable[..., None]:
    def hook(module: Any, given: tuple[Any, ...], more: dict[str, Any]) -> None:
        query, key, value = given[:3]
        for each in {id(each): each for each in (query, key, value)}.values():
            if name is not None:
                add(name, each.reshape(-1, each.shape[-1]))
        if of_output is None:
            return
        if module.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        attended, _ = F.multi_head_attention_forward(
            query,
            key,
            value,
            module.embed_dim,
            module.num_heads,
            module.in_proj_weight,
            module.in_proj_bias,
            module.bias_k,
            module.bias_v,
            module.add_zero_attn,
            0.0,
            torch.eye(module.embed_dim, device=query.device, dtype=query.dtype),
            None,
            training=False,
            need_weights=False,
            attn_mask=more.get("attn_mask"),
            use_separate_proj_weight=module.in_proj_weight is None,
            q_proj_weight=module.q_proj_weight,
            k_proj_weight=module.k_proj_weight,
            v_proj_weight=module.v_proj_weight,
        )
        add(of_output, attended.reshape(-1, module.embed_dim))

    return hook


def _adapted(training: Training) -> dict[str, Adapted]:
    assert training.model.adapters is not None
    return training.model.adapters.weights()


def _images(training: Training, inputs: TaskInputs) -> Iterator[tuple[Tensor, Tensor]]:
    # The training images of this process's part and their targets, as many at a time as in a step;
    # with "auto" that is not known yet.
    config, world, device = training.config, training.world, training.model.device
    at_a_time = config.batch_size
    if (given := config.micro_batch) is not None:
        at_a_time = int(given) if given.isdecimal() else _WITH_AUTO
    loader = batches(
        inputs.task.train,
        training.model.preprocess,
        config.batch_size * world.size,
        workers=config.workers,
        part=world.rows,
    )
    for (images, targets, _), count in zip(loader, batch_sizes(loader), strict=True):
        mine = slice(world.distinct(count))  # the rest are repetitions
        parts = (each[mine].to(device).split(at_a_time) for each in (images, targets))
        yield from (part for part in zip(*parts, strict=True) if len(part[0]))
