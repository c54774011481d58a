"""prototype_cross_entropy: loss_i = -(1 - e) log q_iy - e mean_j log q_ij.

    q_i = softmax(scale X W^T), X [N, D], W [P, D], y the target, e the label smoothing, j over the
    classes that take part, C of them
    G_ij = q_ij - (1 - e) [j = y] - e / C

It is what the kernel `row_losses` (`teacher_kl`) computes of a student without teachers. The loss
is NaN where the target is outside [0, P) or a class that the mask excludes; no memory is read at
such a target.
"""

from __future__ import annotations

from torch import Tensor

from mulki.ops import reference
from mulki.ops.operators import OPERATORS, Request
from mulki.ops.prototype_cross_entropy import PrototypeCrossEntropy

from .gradients import Gradients
from .teacher_kl import Inputs, Numbers, Outputs, compute
from .tiles import Operands, as_bytes, new_float32


def prototype_cross_entropy(x: PrototypeCrossEntropy, request: Request) -> tuple[Tensor, ...]:
    n = len(x.features)
    if n == 0:
        return reference.run(OPERATORS["prototype_cross_entropy"], x, request)
    operands = Operands.of((x.features,), (x.prototypes,), (x.scale,))
    target, count = x.target.contiguous(), None
    if request.reduction == "mean":
        count = (target != x.ignore_index).sum().float()
    if request.reduction == "none" and request.grad is not None:
        # That of an ignored row may be anything.
        request = request._replace(grad=request.grad.masked_fill(target == x.ignore_index, 0))
    gradients = Gradients(x[:3], operands, request, count)
    loss, of_scale = new_float32(x.features, n), new_float32(x.features, n)
    inputs, numbers = Inputs(target, as_bytes(x.class_mask)), Numbers(smoothing=x.label_smoothing)
    compute(operands, inputs, Outputs(loss, of_scale=of_scale), numbers, gradients, x.ignore_index)
    return gradients.results(loss, (), (of_scale,))
