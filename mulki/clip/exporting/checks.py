"""Whether an exported model says what the original says, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from mulki.clip.models import VisionLanguageModel
from mulki.errors import InputError
from mulki.files import new_folder

#: The largest difference of a feature, of unit length, that is rounding in float32.
TOLERANCE = 1e-4
#: Texts of several lengths, one of them longer than the context.
TEXTS = (
    "a photo of a cat.",
    "It's 3 o'clock: a centered satellite photo of annual crop land!",
    "naïve café, 東京",
    "dog",
    "a very long text " * 40,
)
_IMAGES = 3


def need_packages(what: str, *packages: str) -> None:
    """Check that packages are installed.

    Raises:
        InputError: naming all that are not.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise InputError(
            f"{what}: needs {', '.join(missing)}, not installed here; pip install 'mulki[export]'"
        )


@contextmanager
def export_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder that becomes `folder` when the block ends without an error.

    Raises:
        InputError: `folder` is there and not empty, or cannot be made.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder}: exists and is not empty; pass another folder, or remove it")
    with ExitStack() as stack:
        try:
            new = stack.enter_context(new_folder(folder))
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be made ({error.strerror}); choose another place"
            ) from None
        yield new


@torch.no_grad()
def largest_difference(
    model: VisionLanguageModel,
    encode_images: Callable[[Tensor], Tensor],
    encode_texts: Callable[[Tensor], Tensor],
) -> float:
    """Compare the features of an exported model with the original's, on drawn pixels and `TEXTS`.

    Args:
        model: the original, on the CPU.
        encode_images: pixels [B, 3, H, W] to unit features [B, D], of any B.
        encode_texts: token ids [B, L] to unit features [B, D].

    Returns:
        The largest difference of an element.

    Raises:
        InputError: it is more than `TOLERANCE`.
    """
    model.eval()
    generator = torch.Generator().manual_seed(0)
    size = model.image_size
    pixels = torch.randn(_IMAGES, 3, size, size, generator=generator)
    tokens = model.tokenizer(list(TEXTS))
    original = torch.nn.functional.normalize(model.clip.encode_text(tokens).float(), dim=-1)
    differences = {
        "images": (encode_images(pixels) - model.encode_images(pixels)).abs().max(),
        "one image": (encode_images(pixels[:1]) - model.encode_images(pixels[:1])).abs().max(),
        "texts": (encode_texts(tokens) - original).abs().max(),
    }
    for what, value in differences.items():
        # A NaN fails this too.
        if not value <= TOLERANCE:
            raise InputError(
                f"{model.name}: its exported features of {what} differ by {value:.1e} from the "
                f"original's, at most {TOLERANCE:.0e} is rounding; the format has no such "
                "architecture, so nothing was written"
            )
    return max(float(value) for value in differences.values())
