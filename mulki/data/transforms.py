"""Image transforms for training, and whether one always gives the same result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mulki.errors import InputError, nearest

AUGMENTATIONS = ("none", "crop")

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
    or a function of one's own counts as random. What holds may be cached, images and features.
    """
    kind = type(transform)
    if _full_name(kind) == _TORCHVISION + "Compose":
        return all(is_deterministic(step) for step in transform.transforms)
    if _full_name(kind) == _OPEN_CLIP + "ResizeKeepRatio":
        return bool(transform.random_scale_prob == 0 and transform.random_aspect_prob == 0)
    return _full_name(kind) in _FIXED or _full_name(transform) in _FIXED


def train_transform(
    preprocess_val: Callable[..., Any],
    augment: str,
    size: int | tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[..., Any]:
    """The transform of training images.

    Args:
        preprocess_val: the model's evaluation transform.
        augment: "none" for `preprocess_val` itself, whose outputs can be cached; "crop" for a
            random crop of 0.9 to 1.0 of the area, resized bicubically, as ZSCL does.
        size: output height and width in pixels.
        mean, std: per RGB channel, [3], of pixels in 0..1.

    Raises:
        InputError: any other `augment`.
    """
    if augment == "none":
        return preprocess_val
    if augment != "crop":
        raise InputError(
            f'augment "{augment}": unknown{nearest(augment, AUGMENTATIONS)}; '
            f"choose from {', '.join(AUGMENTATIONS)}"
        )
    from torchvision import transforms as tv

    bicubic = tv.InterpolationMode.BICUBIC
    crop = tv.RandomResizedCrop(size, scale=(0.9, 1.0), interpolation=bicubic)
    composed: Callable[..., Any] = tv.Compose([crop, tv.ToTensor(), tv.Normalize(mean, std)])
    return composed


def _full_name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"
