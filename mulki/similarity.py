"""Similarity: a scaled [N, P] matrix of dot products that is described, not computed."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mulki import ops
from mulki.ops import checks
from mulki.ops.logits import Operands


@dataclass(frozen=True, eq=False, repr=False)
class Similarity:
    """The matrix ``scale * features @ prototypes.T``, of shape [N, P], without its storage.

    Losses take a ``Similarity`` instead of logits so that they can be computed tile by tile; call
    `materialize` to see the matrix itself.

    Args:
        features: [N, D] floating point tensor, one row per sample. L2-normalise it beforehand if
            the entries are to be cosines.
        prototypes: [P, D] tensor of the same dtype and on the same device, one row per class, P at
            least 1. Under autocast, which rounds both, dtypes other than float64 may differ.
        scale: the logit scale (an inverse temperature), a float or a 0-d tensor, which may require
            grad. CLIP uses 100.

    Raises:
        TypeError: an argument is not a floating point tensor (or a number, for ``scale``), or the
            dtypes differ.
        ValueError: the ranks, the widths D or the devices do not fit together, or P is 0.
    """

    features: Tensor  # [N, D]
    prototypes: Tensor  # [P, D]
    scale: Tensor | float = 1.0

    def __post_init__(self) -> None:
        names = "features", "prototypes", "scale"
        checks.inputs(self.features, self.prototypes, self.scale, names)
        if (self.prototypes.shape[0] > 0) is not True:
            checks.some_rows("prototypes", self.prototypes)

    def __repr__(self) -> str:
        (n, d), p = self.features.shape, len(self.prototypes)
        dtype = str(self.dtype).removeprefix("torch.")
        # A value on another device would have to be waited for.
        scale = "a tensor"
        if not (isinstance(self.scale, Tensor) and not self.scale.is_cpu):
            with suppress(RuntimeError):  # within vmap it has no value
                given = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
                scale = f"{float(given):g}"
        return f"Similarity([{n}, {p}], width={d}, scale={scale}, {dtype}, {self.device})"

    # Type checkers shall go on to refuse all of this.
    if not TYPE_CHECKING:

        @classmethod
        def __torch_function__(cls, function, *_):
            # torch calls this where a Similarity is an argument of one of its functions.
            raise TypeError(
                f"torch.{function.__name__}: got a Similarity, whose matrix is not computed; call "
                f".materialize() for it"
            )

        def _refuse(self, *_):
            raise TypeError(
                "a Similarity is no tensor: its matrix is not computed; call .materialize() for it"
            )

        __getitem__ = __matmul__ = __rmatmul__ = _refuse
        __add__ = __radd__ = __sub__ = __rsub__ = _refuse
        __mul__ = __rmul__ = __truediv__ = __neg__ = _refuse

        def __getattr__(self, name):
            # Asked for what is not here.
            remedy = "; call .materialize() for the matrix" if hasattr(Tensor, name) else ""
            raise AttributeError(f"a Similarity has no attribute {name!r}{remedy}")

    @property
    def operands(self) -> Operands:
        """Features, prototypes and scale."""
        return self.features, self.prototypes, self.scale

    @property
    def shape(self) -> torch.Size:
        """[N, P]."""
        return torch.Size((self.features.shape[0], self.prototypes.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return self.features.dtype

    @property
    def device(self) -> torch.device:
        return self.features.device

    @property
    def requires_grad(self) -> bool:
        """Whether any of features, prototypes and scale requires grad."""
        scale_grad = isinstance(self.scale, Tensor) and self.scale.requires_grad
        return self.features.requires_grad or self.prototypes.requires_grad or scale_grad

    @property
    def T(self) -> Similarity:
        """The transpose [P, N]: features and prototypes swap roles."""
        return Similarity(self.prototypes, self.features, self.scale)

    def detach(self) -> Similarity:
        """The same matrix, cut from the autograd graph."""
        scale = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
        return Similarity(self.features.detach(), self.prototypes.detach(), scale)

    def materialize(self) -> Tensor:
        """The [N, P] matrix, differentiable; in the dtype of the features, or that of autocast.

        Raises:
            TypeError: the dtypes differ, as they may under autocast, and this is outside it.
        """
        return ops.similarity.matrix(self.operands)
