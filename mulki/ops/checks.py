"""The checks of all arguments, with their messages: which argument, what came, what was wanted.

The public functions check the Python types of their arguments and their numbers. Every operator
checks its tensors (shapes, dtypes, devices, values), before any kernel, so that a direct call of
`torch.ops.mulki` is checked as well. Each has one function for that, made of the parts here.

Sizes may be symbols while torch.compile traces. Values are read on the CPU alone: elsewhere that
would wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from numbers import Real

import torch
from torch import Tensor

from mulki.ops.logits import autocasting, wide
from mulki.ops.torch_private import check as _check

REDUCTIONS = ("none", "sum", "mean")


def is_tensor(name: str, value: object, wanted: str = "a torch.Tensor") -> None:
    """A tensor. Raises TypeError."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        remedy = "; make one with torch.as_tensor" if kind in ("list", "tuple", "ndarray") else ""
        raise TypeError(f"{name}: got {kind}, wanted {wanted}{remedy}")


def choice(name: str, value: object, choices: Collection[str]) -> None:
    """One of some words. Raises ValueError."""
    if value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(choices)}")


def real(name: str, value: object) -> None:
    """A number. Raises TypeError."""
    # The first test is quicker, and most numbers are floats.
    if type(value) is not float and not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number")


def finite_number(name: str, value: object, purpose: str = "") -> None:
    """A finite number, and no bool. Raises TypeError, ValueError.

    Args:
        purpose: what the number is for, behind "wanted a number" in the message.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a number{purpose}")
    if not -math.inf < float(value) < math.inf:
        raise ValueError(f"{name}: got {value}, wanted a finite number{purpose}")


#: Beyond these the square of a temperature is no float32.
COLDEST, HOTTEST = 1e-18, 1e18


def temperature(name: str, value: float) -> None:
    """A number above zero, and no bool, whose square is a float32. Raises TypeError, ValueError."""
    if type(value) is float and COLDEST <= value <= HOTTEST:
        return
    finite_number(name, value)
    if not value > 0:
        raise ValueError(f"{name}: got {value}, wanted a positive number")
    if not COLDEST <= value <= HOTTEST:
        raise ValueError(f"{name}: got {value}, wanted {COLDEST} to {HOTTEST}")


def fraction(name: str, value: float) -> None:
    """A number in [0, 1]. Raises TypeError, ValueError."""
    if type(value) is float and 0.0 <= value <= 1.0:
        return
    real(name, value)
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"{name}: got {value}, wanted a number in [0, 1]")


def scalar(name: str, value: object, device: torch.device) -> None:
    """A float, or a 0-d floating point tensor that tensors on `device` combine with.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if isinstance(value, Tensor):
        zero_dimensional(name, value)
        if not value.is_floating_point():
            raise TypeError(f"{name}: got dtype {value.dtype}, wanted a floating point one")
        if value.device.type != "cpu" and value.device != device:
            raise ValueError(f"{name}: got device {value.device}, wanted {device}; move it there")
    elif type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise TypeError(f"{name}: got {type(value).__name__}, wanted a float or a 0-d tensor")


def inputs(
    features: object, prototypes: object, scale: object, names: tuple[str, str, str]
) -> None:
    """Features [N, D], prototypes [P, D] and a scale as users pass them.

    Under autocast, which rounds both, dtypes other than float64 may differ.

    Args:
        names: what errors call the three.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not (isinstance(features, Tensor) and isinstance(prototypes, Tensor)):
        is_tensor(names[0], features)
        is_tensor(names[1], prototypes)
    assert isinstance(features, Tensor) and isinstance(prototypes, Tensor)
    if not _are_matrices(features, prototypes):
        exact = torch.float64 in (features.dtype, prototypes.dtype)
        matrices(features, prototypes, names, exact or not autocasting(features.device.type))
    if type(scale) is float:
        return
    if not (
        isinstance(scale, Tensor)
        and scale.ndim == 0
        and scale.is_floating_point()
        and scale.device == features.device
    ):
        scalar(names[2], scale, features.device)


def number(name: str, value: Tensor, features: Tensor) -> None:
    """A number as the operators take it: 0-d, wide, and where the features are.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    zero_dimensional(name, value)
    if value.dtype != wide(features.dtype):
        raise TypeError(f"{name}: got {value.dtype}, wanted {wide(features.dtype)}; cast it")
    on_device(name, value, features.device)


def zero_dimensional(name: str, value: Tensor) -> None:
    """A tensor of no dimensions. Raises ValueError."""
    if value.ndim != 0:
        raise ValueError(
            f"{name}: got shape {list(value.shape)}, wanted a float or a 0-d tensor; "
            f"call .reshape(()) on a tensor of one element"
        )


def _are_matrices(features: Tensor, prototypes: Tensor) -> bool:
    # Whether `matrices` would pass, in one test for what is nearly always the case. Comparisons of
    # sizes that are symbols are not True but symbols, and are left to the longer way.
    return (
        features.ndim == prototypes.ndim == 2
        and features.dtype == prototypes.dtype
        and features.is_floating_point()
        and features.device == prototypes.device
        and (features.shape[1] == prototypes.shape[1]) is True
    )


def matrices(
    features: Tensor, prototypes: Tensor, names: Sequence[str], same_dtype: bool = True
) -> None:
    """Features [N, D] and prototypes [P, D], floating point, of one dtype and on one device.

    Args:
        names: what errors call the two.
        same_dtype: whether the dtypes have to be the same.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if _are_matrices(features, prototypes):
        return
    for name, value in zip(names, (features, prototypes), strict=False):
        if not value.is_floating_point():
            raise TypeError(
                f"{name}: got dtype {value.dtype}, wanted a floating point tensor; "
                f"call .float() on it"
            )
        if value.ndim != 2:
            raise ValueError(
                f"{name}: got shape {list(value.shape)}, wanted 2 dimensions [rows, D]"
            )
    fits = features.shape[1] == prototypes.shape[1]
    if fits is not True:
        _check(
            ValueError,
            fits,
            lambda: (
                f"{names[1]}: got shape {list(prototypes.shape)}, wanted "
                f"[rows, {features.shape[1]}] to match {names[0]} {list(features.shape)}"
            ),
        )
    if same_dtype and features.dtype != prototypes.dtype:
        raise TypeError(
            f"{names[1]}: got dtype {prototypes.dtype}, wanted {features.dtype} as {names[0]} "
            f"have; cast one to the other"
        )
    on_device(names[1], prototypes, features.device)


def teacher(
    index: int,
    features: Tensor,
    prototypes: Tensor,
    student_features: Tensor,
    student_prototypes: Tensor,
) -> None:
    """The features [N, D_k] and prototypes [P, D_k] of a teacher, N and P those of the student.

    Raises:
        TypeError, ValueError: naming the teacher by its index.
    """
    n, p = student_features.shape[0], student_prototypes.shape[0]
    if (
        _are_matrices(features, prototypes)
        and features.dtype == student_features.dtype
        and features.device == student_features.device
        and (features.shape[0] == n) is True
        and (prototypes.shape[0] == p) is True
    ):
        return
    name = f"teachers[{index}]"
    matrices(features, prototypes, (f"{name}.features", f"{name}.prototypes"))
    rows, columns = features.shape[0], prototypes.shape[0]

    def message() -> str:
        return f"{name}: got shape [{rows}, {columns}], wanted [{n}, {p}] as the student"

    for fits in (rows == n, columns == p):
        if fits is not True:
            _check(ValueError, fits, message)
    if features.dtype != student_features.dtype:
        raise TypeError(
            f"{name}: got dtype {features.dtype}, wanted {student_features.dtype} as the "
            f"student; cast one to the other"
        )
    on_device(name, features, student_features.device)


def some_rows(name: str, value: Tensor) -> None:
    """At least one row. Raises ValueError."""
    fits = value.shape[0] > 0
    if fits is not True:
        _check(
            ValueError,
            fits,
            lambda: f"{name}: got shape {list(value.shape)}, wanted at least one row",
        )


def operands(features: Tensor, prototypes: Tensor, scale: Tensor) -> None:
    """Features [N, D], P >= 1 prototypes [P, D] and a 0-d scale.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    matrices(features, prototypes, ("features", "prototypes"))
    some_rows("prototypes", prototypes)
    number("scale", scale, features)


def pairs(images: Tensor, texts: Tensor) -> None:
    """Features [N, D] of images and texts that match row by row; N may be 0.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    matrices(images, texts, ("image_features", "text_features"))
    matching_rows(images, texts)


def matching_rows(
    images: Tensor, texts: Tensor, names: Sequence[str] = ("image_features", "text_features")
) -> None:
    """As many rows in both. Raises ValueError."""
    fits = images.shape[0] == texts.shape[0]
    if fits is not True:
        _check(
            ValueError,
            fits,
            lambda: (
                f"{names[1]}: got shape {list(texts.shape)}, wanted {list(images.shape)} as "
                f"{names[0]}: pairs match row by row"
            ),
        )


def on_device(name: str, value: Tensor, device: torch.device) -> None:
    """A tensor on this device. Raises ValueError."""
    if value.device != device:
        raise ValueError(f"{name}: got device {value.device}, wanted {device}; move it there")


def shape(name: str, value: Tensor, wanted: Sequence[int]) -> None:
    """A tensor of this shape. Raises ValueError."""

    def message() -> str:
        return f"{name}: got shape {list(value.shape)}, wanted {list(wanted)}"

    if value.ndim != len(wanted):
        raise ValueError(message())
    for got, size in zip(value.shape, wanted, strict=True):
        fits = got == size
        if fits is not True:
            _check(ValueError, fits, message)


def dtype(name: str, value: Tensor, wanted: torch.dtype, remedy: str) -> None:
    """A tensor of this dtype. Raises TypeError."""
    if value.dtype != wanted:
        what = str(wanted).removeprefix("torch.")
        raise TypeError(f"{name}: got {value.dtype}, wanted {what}; use {name}.{remedy}()")


def class_mask(mask: Tensor | None, prototypes: Tensor, values: bool) -> None:
    """A bool mask [P], in which at least one class takes part.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if mask is None:
        return
    dtype("class_mask", mask, torch.bool, "bool")
    shape("class_mask", mask, prototypes.shape[:1])
    on_device("class_mask", mask, prototypes.device)
    if values and mask.device.type == "cpu" and not mask.any():
        raise ValueError("class_mask: masks every class, wanted at least one True")


def target(
    value: Tensor,
    features: Tensor,
    prototypes: Tensor,
    mask: Tensor | None,
    ignore_index: int | None,
    values: bool,
) -> None:
    """int64 targets [N] in [0, P), of classes that take part, or `ignore_index`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    shape("target", value, features.shape[:1])
    dtype("target", value, torch.int64, "long")
    on_device("target", value, features.device)
    if values and value.device.type == "cpu":
        target_values(value, prototypes.shape[0], mask, ignore_index)


def target_values(
    target: Tensor, classes: int, mask: Tensor | None = None, ignore_index: int | None = None
) -> None:
    """Targets in [0, classes), of classes that take part, or `ignore_index`; on any device.

    Raises:
        ValueError: naming the target.
    """
    if target.numel() == 0:
        return
    low, high = (int(value) for value in target.aminmax())
    if low >= 0 and high < classes and mask is None:
        return
    used = target if ignore_index is None else target[target != ignore_index]
    if used.numel() == 0:
        return
    low, high = (int(value) for value in used.aminmax())
    if low < 0 or high >= classes:
        raise ValueError(
            f"target: got values from {low} to {high}, wanted class indices in [0, {classes})"
            + ("" if ignore_index is None else f" or ignore_index={ignore_index}")
        )
    if mask is not None and not mask[used].all():
        masked = int(used[~mask[used]][0])
        raise ValueError(
            f"target: holds class {masked}, which class_mask excludes; unmask it or leave its rows "
            f"out"
        )


def finite(**values: Tensor | float | None) -> None:
    """No NaN and no infinity in any of the values, which are read wherever they are.

    Raises:
        ValueError: naming the argument, and the row.
    """
    for name, value in values.items():
        if value is None:
            continue
        if not isinstance(value, Tensor):
            value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
        bad = ~torch.isfinite(value)
        if not bad.any():
            continue
        place = bad.nonzero()[0].tolist()
        what = "NaN" if math.isnan(value[tuple(place)].item()) else "infinity"
        where = f" in row {place[0]}" if place else ""
        raise ValueError(
            f"{name}: got {what}{where}, wanted finite values; look at what computed it, which may "
            f"have overflowed or divided by zero"
        )
