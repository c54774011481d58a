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

#: Between the names of several transforms.
TOGETHER = "+"

_CROP = "crop"

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
        augment: a name in `transform_names`, or several with `TOGETHER` between, in the order in
            which they change an image; see `register_transform` for the other arguments.

    Raises:
        InputError: any other `augment`, or one whose function fails or returns no callable.
    """
    transform = preprocess_val
    for name in reversed(augment.split(TOGETHER)):
        if name == _CROP and transform is preprocess_val:
            transform = _of_size(mean, std)
        transform = _built(name, transform, size, mean, std)
    return transform


def _built(
    augment: str,
    inner: Transform,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Transform:
    if augment not in _BUILDERS:
        raise InputError(
            f'augment "{augment}": unknown{nearest(augment, _BUILDERS)}; '
            f"choose from {', '.join(_BUILDERS)}"
        )
    builder = _BUILDERS[augment]
    try:
        transform = builder(inner, size, mean, std)
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
def _none(preprocess_val: Transform, *given: Any) -> Transform:
    """The evaluation transform itself, whose outputs can be cached."""
    return preprocess_val


@register_transform(_CROP)
def _crop(preprocess_val: Transform, size: int | tuple[int, int], *given: Any) -> Transform:
    """A random crop of 0.9 to 1.0 of the area, resized bicubically, as ZSCL does."""
    from torchvision import transforms as tv

    bicubic = tv.InterpolationMode.BICUBIC
    crop = tv.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=bicubic)
    return _before(preprocess_val, crop)


def _register_step(name: str, kind: str, *given: float) -> None:
    @register_transform(name)
    def build(preprocess_val: Transform, *rest: Any) -> Transform:
        from torchvision.transforms import v2

        return _before(preprocess_val, getattr(v2, kind)(*given))


# The mirror image of every second image.
_register_step("flip", "RandomHorizontalFlip")
# Brightness, contrast and saturation between 0.6 and 1.4 of what they are, as timm does.
_register_step("color", "ColorJitter", 0.4, 0.4, 0.4)
# Two changes of 14 kinds, at magnitude 9 (RandAugment, arXiv 1909.13719).
_register_step("randaugment", "RandAugment")
# One change of any kind and magnitude (TrivialAugment, arXiv 2103.10158).
_register_step("trivialaugment", "TrivialAugmentWide")


def _of_size(mean: Sequence[float], std: Sequence[float]) -> Transform:
    # In place of the evaluation transform, which may cut off more of what has its size already.
    from torchvision import transforms as tv

    composed: Transform = tv.Compose([tv.ToTensor(), tv.Normalize(mean, std)])
    return composed


def _before(transform: Transform, step: Any) -> Transform:
    from torchvision import transforms as tv

    composed: Transform = tv.Compose([step, transform])
    return composed


def _full_name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
