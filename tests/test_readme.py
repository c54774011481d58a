"""What the README shows in code must run."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F

from mulki.losses import ClipLoss

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)


def block(words: str) -> str:
    """The one block of code with these words."""
    (found,) = (code for code in BLOCKS if words in code)
    return found


def test_the_losses_in_place_of_open_clips_run() -> None:
    class Model(torch.nn.Linear):
        def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
            image, text = (
                F.normalize(super(Model, self).forward(x), dim=1) for x in (images, texts)
            )
            scale = torch.tensor(10.0)
            return {"image_features": image, "text_features": text, "logit_scale": scale}

    model = Model(5, 4)
    names = {"model": model, "images": torch.randn(6, 5), "texts": torch.randn(6, 5)}
    exec(block("mulki.losses"), names | {"rank": 0, "world_size": 1})
    assert model.weight.grad is not None and model.weight.grad.abs().sum() > 0


def test_the_example_of_micro_batches_is_a_step_on_the_whole_batch() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.image, self.text = torch.nn.Linear(5, 8), torch.nn.Linear(6, 8)

        def forward(self, images: torch.Tensor, texts: torch.Tensor) -> dict[str, torch.Tensor]:
            encoded = self.image(images), self.text(texts)
            image_features, text_features = (F.normalize(x, dim=1) for x in encoded)
            return {
                "image_features": image_features,
                "text_features": text_features,
                "logit_scale": torch.tensor(10.0),
            }

    ours, whole = Model(), Model()
    names = {
        "loss": ClipLoss(),
        "model": ours,
        "images": torch.randn(100, 5),
        "texts": torch.randn(100, 6),
        "optimizer": torch.optim.SGD(ours.parameters(), lr=0.1),
    }
    exec(block("micro_batch"), names)
    ClipLoss()(**whole(names["images"], names["texts"])).backward()
    torch.optim.SGD(whole.parameters(), lr=0.1).step()
    for parameter, wanted in zip(ours.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(parameter, wanted)


def test_the_loss_example_runs_and_reaches_the_student() -> None:
    code = block("mulki.functional")
    n, p = 6, 4

    def rows(count: int, width: int) -> torch.Tensor:
        return F.normalize(torch.randn(count, width), dim=1)

    images = rows(n, 16).requires_grad_()
    names = {
        "image_features": images,
        "text_features": rows(p, 16).requires_grad_(),
        "logit_scale": torch.tensor(20.0),
        "target": torch.arange(n) % p,
        "zs_images": rows(n, 24),
        "zs_texts": rows(p, 24),
        "zs_scale": torch.tensor(30.0),
        "prev_images": rows(n, 8),
        "prev_texts": rows(p, 8),
        "prev_scale": 10.0,
    }
    exec(code, names)
    loss = names["loss"]
    loss.backward()
    assert loss.shape == () and torch.isfinite(loss)
    assert images.grad is not None and images.grad.abs().sum() > 0


def test_the_methods_of_the_readme_are_those_there_are() -> None:
    from mulki import methods

    listed = re.findall(r"^\| `(\w+)` \|", README.read_text(), flags=re.MULTILINE)
    assert sorted(listed) == list(methods.available())
