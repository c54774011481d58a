"""What the losses keep for backward grows as B D, not as B^2."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.losses.two_towers import OURS

WIDTH = 32


def saved_bytes(loss, kind: str, n: int) -> int:
    """The bytes of the storages that a call keeps, each counted once."""
    generator = torch.Generator().manual_seed(0)

    def rows() -> torch.Tensor:
        return torch.nn.functional.normalize(torch.randn(n, WIDTH, generator=generator), dim=1)

    out = {"image_features": rows().requires_grad_(), "text_features": rows().requires_grad_()}
    out["logit_scale"] = torch.tensor(10.0, requires_grad=True)
    if kind == "siglip":
        out["logit_bias"] = torch.tensor(-5.0, requires_grad=True)
    for prefix in {"distill": ("dist_",), "dual": ("dist_", "prev_")}.get(kind, ()):
        features = {f"{prefix}image_features": rows(), f"{prefix}text_features": rows()}
        out |= features | {f"{prefix}logit_scale": torch.tensor(8.0)}
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = loss(**out, output_dict=True)
    del losses
    return sum(storages.values())


@pytest.mark.parametrize("kind", OURS)
def test_memory_kept_for_backward_is_linear_in_the_batch(kind):
    small, large = (saved_bytes(OURS[kind](), kind, n) for n in (256, 512))
    assert 1.9 < large / small < 2.1
    # Features of all models, the gradients of the student's, and weights of the teachers.
    models = {"clip": 1, "siglip": 1, "distill": 2, "dual": 3}[kind]
    assert large <= ((2 + 2 * models) * WIDTH + 2 * models) * 512 * 4 + 1024
