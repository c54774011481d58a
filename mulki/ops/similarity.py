"""similarity: z = s X W^T [N, P], the rows of X and W L2-normalised first if asked for.

It is the one operator whose result is the whole matrix, so a library's product is the fastest there
is: where no Triton kernel serves, `matrix` is plain PyTorch. Gradients for an upstream gradient G:
dX = s G W, dW = s G^T X, ds = <X, G W>, and through u = v / max(|v|, 1e-12) where rows are
normalised. Half precision is rounded once, with the scale in the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.ops import backends, calls, checks, torch_private
from mulki.ops.arguments import refuse_transforms, rounded, savable, scalar
from mulki.ops.logits import Operands, autocasting, logits, multiplies_halves, wide
from mulki.ops.registry import define


class SimilarityMatrix(NamedTuple):
    features: Tensor  # [N, D]
    prototypes: Tensor  # [P, D]
    scale: Tensor  # 0-d
    normalize: bool = False


def check(x: SimilarityMatrix, *, values: bool = True) -> None:
    checks.operands(x.features, x.prototypes, x.scale)


def reference(x: SimilarityMatrix) -> tuple[Tensor]:  # [N, P] in the dtype of the features
    """The specification, differentiable."""
    dtype = x.features.dtype
    features, prototypes = x.features.to(wide(dtype)), x.prototypes.to(wide(dtype))
    if x.normalize:
        features, prototypes = F.normalize(features, dim=1), F.normalize(prototypes, dim=1)
    return (logits(features, prototypes, x.scale).to(dtype),)


define(
    "similarity",
    SimilarityMatrix,
    check=check,
    reference=reference,
    rows=lambda x: (x.features.shape[0], x.prototypes.shape[0]),
    dtype=lambda dtype: dtype,
    reductions=("none",),
)


def matrix(operands: Operands, normalize: bool = False) -> Tensor:
    """[N, P] in the dtype of the features, in that of autocast under autocast.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    features, prototypes, scale = rounded(operands)
    if backends.may_be_triton("similarity", features):
        refuse_transforms(operands)
        x = SimilarityMatrix(features, prototypes, scalar(scale, features), normalize)
        return calls.call("similarity", x, "none")[0]
    if not torch.compiler.is_compiling():
        features, prototypes, scale = map(savable, (features, prototypes, scale))
    if features.dtype == wide(features.dtype):
        if normalize:
            features, prototypes = F.normalize(features, dim=1), F.normalize(prototypes, dim=1)
        return (features * scale) @ prototypes.mT
    if autocasting(features.device.type):
        # Its operands are rounded; inside, autocast would round what is made of them.
        with torch.autocast(features.device.type, enabled=False):
            return _of_halves(features, prototypes, scale, normalize)
    return _of_halves(features, prototypes, scale, normalize)


# Operations of a product, from which on half precision is the faster one.
_LARGE = 1 << 21


def _of_halves(
    features: Tensor, prototypes: Tensor, scale: Tensor | float, normalize: bool
) -> Tensor:
    if not normalize and torch_private.nothing_listens() and multiplies_scaled(features):
        (n, d), p = features.shape, len(prototypes)
        if n * p * d >= _LARGE or not features.is_cpu:
            s = scalar(scale, features)
            return _Product.apply(features, prototypes, s)  # type: ignore[no-any-return, no-untyped-call]
    x, w = features.float(), prototypes.float()
    if normalize:
        x, w = F.normalize(x, dim=1), F.normalize(w, dim=1)
    return ((x * scale) @ w.mT).to(features.dtype)


def multiplies_scaled(like: Tensor) -> bool:
    """Whether torch has a product of this half precision with a factor, rounded once."""
    if like.is_cpu:
        return like.dtype == torch.bfloat16 and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return multiplies_halves(like.device, like.dtype)


def _scaled(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    # scale a b, rounded once to the dtype of a and b.
    if a.is_cpu:
        return torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale.item())
    return torch.mm(a, b, out_dtype=scale.dtype).mul_(scale).to(a.dtype)


class _Product(torch.autograd.Function):
    """s X W^T of half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, scale)
        return _scaled(x, w.mT, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w, scale = ctx.saved_tensors
        to_x, to_w, to_scale = ctx.needs_input_grad
        of_x = of_w = of_scale = None
        if to_scale:
            # At scale 1: the scale may be zero.
            of_x = _scaled(grad, w, torch.ones_like(scale))
            of_scale = (of_x * x).sum(dtype=scale.dtype)
        if to_x:
            of_x = _scaled(grad, w, scale) if of_x is None else of_x * scale
        if to_w:
            of_w = _scaled(grad.mT, x, scale)
        return of_x if to_x else None, of_w, of_scale
