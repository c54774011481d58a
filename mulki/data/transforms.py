"""Training transforms by name, and whether a transform always gives the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mulki.choices.registration import place_of, register
from mulki.errors import InputError, nearest

#: From an RGB PIL image to a tensor [3, H, W].
Transform = Callable[[Any], Any]
#: From the model's evaluation transform, its input size in pixels (one number, or height and
#: width), and the mean and standard deviation per RGB channel ([3], of pixels in 0..1).
Builder = Callable[
    [Transform, "int | tuple[int, int]", Sequence[float], Sequence[float]], Transform
]

_BUILDERS: dict[str, Builder] = {}

# By name, so that asking imports neither torchvision nor open_clip.
_TORCHVISION = "torchvision.transforms.transforms."
_OPEN_CLIP = "open_clip.transform."
_FIXED = frozenset(
    [_TORCHVISION + n for n in "Resize CenterCrop Pad Grayscale ToTensor PILToTensor".split()]
    + [_TORCHVISION + n for n in "ConvertImageDtype Normalize".split()]
    + [_OPEN_CLIP + n for n in "MaybeConvertMode MaybeToTensor CenterCropOrPad".split()]
    + [_OPEN_CLIP + "_convert_to_rgb"]
)


def is_deterministic(transform: Any) -> bool:
    """Whether a transform gives the same tensor for the same image every time.

    True only for steps known to be so, from torchvision and open_clip, alone or composed; a Lambda
    or a function of one's own counts as random. Only then images and teachers' features are cached.
    """
    kind = type(transform)
    if _full_name(kind) == _TORCHVISION + "Compose":
        return all(is_deterministic(step) for step in transform.transforms)
    if _full_name(kind) == _OPEN_CLIP + "ResizeKeepRatio":
        return bool(transform.random_scale_prob == 0 and transform.random_aspect_prob == 0)
    return _full_name(kind) in _FIXED or _full_name(transform) in _FIXED


def register_transform(name: str) -> Callable[[Builder], Builder]:
    """Decorate a function that builds a training transform, to make it ``--augment name``.

    The function gets the model's evaluation transform, its input size, mean and standard deviation
    (see `Builder`) and returns a callable from an RGB PIL image to a tensor. That has to pickle,
    for DataLoader workers, so it is no lambda and no function inside a function. Randomness drawn
    from the generators of torch, NumPy or Python repeats with the seed of the run.

    Raises:
        InputError: the name is empty or taken.
    """

    def decorate(builder: Builder) -> Builder:
        register(_BUILDERS, "training transform", name, builder)
        return builder

    return decorate


def transform_names() -> tuple[str, ...]:
    """Names of the registered training transforms, in the order registered."""
    return tuple(_BUILDERS)


def train_transform(
    preprocess_val: Transform,
    augment: str,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Transform:
    """The transform of training images.

    Args:
        preprocess_val: the model's evaluation transform.
        augment: a name in `transform_names`; see `register_transform` for the other arguments.

    Raises:
        InputError: any other `augment`, or one whose function fails or returns no callable.
    """
    if augment not in _BUILDERS:
        raise InputError(
            f'augment "{augment}": unknown{nearest(augment, _BUILDERS)}; '
            f"choose from {', '.join(_BUILDERS)}"
        )
    builder = _BUILDERS[augment]
    try:
        transform = builder(preprocess_val, size, mean, std)
    except Exception as error:  # a user's function raises anything
        raise InputError(
            f'augment "{augment}": its function ({place_of(builder)}) failed '
            f"({type(error).__name__}: {error}); correct it"
        ) from error
    if not callable(transform):
        raise InputError(
            f'augment "{augment}": its function returned {type(transform).__name__}, wanted a '
            "callable from an image to a tensor; return the transform"
        )
    return transform


@register_transform("none")
def _none(
    preprocess_val: Transform,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Transform:
    """The evaluation transform itself, whose outputs can be cached."""
    return preprocess_val


@register_transform("crop")
def _crop(
    preprocess_val: Transform,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Transform:
    """A random crop of 0.9 to 1.0 of the area, resized bicubically, as ZSCL does."""
    from torchvision import transforms as tv

    bicubic = tv.InterpolationMode.BICUBIC
    crop = tv.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=bicubic)
    composed: Transform = tv.Compose([crop, tv.ToTensor(), tv.Normalize(mean, std)])
    return composed


def _full_name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
