"""Similarity: a scaled [N, P] matrix of dot products that is described, not computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from mulki import ops
from mulki.ops.router import autocasting


def check_operands(
    features: object,
    prototypes: object,
    scale: object,
    names: tuple[str, str, str] = ("features", "prototypes", "scale"),
) -> None:
    """Check what a `Similarity` or pairs are made of; errors call the operands by `names`.

    Raises:
        TypeError, ValueError: see `Similarity`.
    """
    for name, value in zip(names, (features, prototypes), strict=False):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: got {type(value).__name__}, wanted a torch.Tensor")
        if not value.is_floating_point():
            raise TypeError(
                f"{name}: got dtype {value.dtype}, wanted a floating point tensor; "
                f"call .float() on it"
            )
        if value.ndim != 2:
            raise ValueError(
                f"{name}: got shape {list(value.shape)}, wanted 2 dimensions [rows, D]"
            )
    assert isinstance(features, Tensor) and isinstance(prototypes, Tensor)
    if features.shape[1] != prototypes.shape[1]:
        raise ValueError(
            f"{names[1]}: got shape {list(prototypes.shape)}, wanted [rows, {features.shape[1]}] "
            f"to match {names[0]} {list(features.shape)}"
        )
    dtypes = {features.dtype, prototypes.dtype}
    if torch.float64 in dtypes or not autocasting(features.device.type):
        _check_one_dtype(features, prototypes, names)
    if features.device != prototypes.device:
        raise ValueError(
            f"{names[1]}: got device {prototypes.device}, wanted {features.device} as {names[0]} "
            f"have; move one to the other"
        )
    check_number(names[2], scale, features.device)


def _check_one_dtype(features: Tensor, prototypes: Tensor, names: Sequence[str]) -> None:
    if features.dtype != prototypes.dtype:
        raise TypeError(
            f"{names[1]}: got dtype {prototypes.dtype}, wanted {features.dtype} as {names[0]} "
            f"have; cast one to the other"
        )


def rounded(features: Tensor, prototypes: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the autocast dtype under autocast, where float64 is left alone, else as they are.

    Raises:
        TypeError: the dtypes differ outside autocast.
    """
    kind = features.device.type
    if not autocasting(kind) or features.dtype == torch.float64:
        _check_one_dtype(features, prototypes, ("features", "prototypes"))
        return features, prototypes
    dtype = torch.get_autocast_dtype(kind)
    return features.to(dtype), prototypes.to(dtype)


def check_number(name: str, value: object, device: torch.device) -> None:
    """Check for a float or a 0-d floating point tensor that tensors on `device` combine with.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(value, Tensor):
        if value.ndim != 0:
            raise ValueError(
                f"{name}: got shape {list(value.shape)}, wanted a float or a 0-d tensor; "
                f"call .reshape(()) on a tensor of one element"
            )
        if not value.is_floating_point():
            raise TypeError(f"{name}: got dtype {value.dtype}, wanted a floating point one")
        if value.device.type != "cpu" and value.device != device:
            raise ValueError(f"{name}: got device {value.device}, wanted {device}; move it there")
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a float or a 0-d tensor")


@dataclass(frozen=True, eq=False)
class Similarity:
    """The matrix ``scale * features @ prototypes.T``, of shape [N, P], without its storage.

    Losses take a ``Similarity`` instead of logits so that they can be computed tile by tile; call
    :meth:`materialize` to see the matrix itself.

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
        check_operands(self.features, self.prototypes, self.scale)
        if self.prototypes.shape[0] == 0:
            raise ValueError(
                f"prototypes: got shape {list(self.prototypes.shape)}, wanted at least one row"
            )

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
    def T(self) -> Similarity:  # noqa: N802 - the name tensors use
        """The transpose [P, N]: features and prototypes swap roles."""
        return Similarity(self.prototypes, self.features, self.scale)

    def detach(self) -> Similarity:
        """The same matrix, cut from the autograd graph."""
        scale = self.scale.detach() if isinstance(self.scale, Tensor) else self.scale
        return Similarity(self.features.detach(), self.prototypes.detach(), scale)

    def operands(self) -> tuple[Tensor, Tensor, Tensor | float]:
        """Features, prototypes and scale as an operator takes them.

        Under autocast both tensors are rounded to the autocast dtype (float64 is left alone).

        Raises:
            TypeError: the dtypes differ, as they may under autocast, and this is outside it.
        """
        return *rounded(self.features, self.prototypes), self.scale

    def materialize(self) -> Tensor:
        """The [N, P] matrix in the dtype of the operands, differentiable.

        Raises:
            TypeError: as `operands`.
        """
        return ops.similarity(*self.operands())
