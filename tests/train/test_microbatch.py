"""Gradient caching: the gradients of the whole batch, whatever the size of a micro-batch."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mulki.clip.features import Features
from mulki.functional import clip_contrastive, siglip, teacher_kl
from mulki.losses import MulKILoss
from mulki.similarity import Similarity
from mulki.train.microbatch import Encoder, backward

N, CLASSES, WIDTH = 10, 4, 6


class TwoTowers(nn.Module):
    """A CLIP in the small, returning what open_clip's models do with output_dict=True."""

    def __init__(self, dropout: float = 0.0, checkpointed: bool = False):
        super().__init__()
        self.visual = nn.Sequential(
            nn.Linear(8, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, WIDTH)
        )
        self.text = nn.Linear(5, WIDTH)
        self.logit_scale = nn.Parameter(torch.tensor(1.5))
        self.logit_bias = nn.Parameter(torch.tensor([-2.0]))
        self.checkpointed = checkpointed

    def encode_image(self, images: Tensor) -> Tensor:
        features = (
            checkpoint(self.visual, images, use_reentrant=False)
            if self.checkpointed and torch.is_grad_enabled()
            else self.visual(images)
        )
        return F.normalize(features, dim=-1)

    def encode_text(self, texts: Tensor) -> Tensor:
        return F.normalize(self.text(texts), dim=-1)

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Any]:
        return {
            "image_features": self.encode_image(images),
            "text_features": self.encode_text(texts),
            "logit_scale": self.logit_scale.exp(),
            "logit_bias": self.logit_bias,
            "name": "not a tensor",
        }


def model(**options: Any) -> TwoTowers:
    torch.manual_seed(0)
    return TwoTowers(**options).double()


def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(N, 8, generator=generator, dtype=torch.float64),
        torch.randn(N, 5, generator=generator, dtype=torch.float64),
    )


def contrastive(out: dict[str, Any]) -> Tensor:
    return clip_contrastive(out["image_features"], out["text_features"], out["logit_scale"])


def sigmoid(out: dict[str, Any]) -> Tensor:
    bias = out["logit_bias"].reshape(())
    return siglip(out["image_features"], out["text_features"], out["logit_scale"], bias)


def distillation(out: dict[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    images, texts = (
        F.normalize(torch.randn(N, 3, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    student = Similarity(out["image_features"], out["text_features"], out["logit_scale"])
    kl = teacher_kl(student, [Similarity(images, texts, 7.0)], temperature=2.0)
    return {"contrastive_loss": contrastive(out), "distill_loss": kl}


def gradients(module: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(ours: list[Tensor | None], wanted: list[Tensor | None], tolerance: float = 1e-12) -> None:
    for gradient, expected in zip(ours, wanted, strict=True):
        if expected is None:
            assert gradient is None or not gradient.any()
        else:
            torch.testing.assert_close(gradient, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("loss", [contrastive, sigmoid, distillation])
@pytest.mark.parametrize("micro_batch", [1, 3, 5, 10, 11, None])
def test_gradients_are_those_of_the_batch(
    loss: Callable[..., Any], micro_batch: int | None
) -> None:
    whole, ours = model(), model()
    value = loss(whole(*data()))
    (sum(value.values()) if isinstance(value, dict) else value).backward()
    got = backward(loss, (ours, *data()), micro_batch=micro_batch)
    # The scale's included: counted once, not once a micro-batch.
    same(gradients(ours), gradients(whole))
    assert ours.logit_scale.grad is not None and ours.logit_scale.grad.abs() > 1e-4
    torch.testing.assert_close(got, {k: v.detach() for k, v in value.items()}) if isinstance(
        value, dict
    ) else torch.testing.assert_close(got, value.detach())


@pytest.mark.parametrize("micro_batch", [3, None])
@pytest.mark.parametrize("others", [1, 2, 7])
def test_an_encoder_of_another_batch_has_micro_batches_of_its_own(
    micro_batch: int | None, others: int
) -> None:
    images, texts = data()
    more = torch.randn(7, 8, generator=torch.Generator().manual_seed(5)).double()
    calls: list[int] = []

    def loss(features: dict[str, Any], of_more: Tensor) -> Tensor:
        sums = features["image_features"].sum(0) @ of_more.square().sum(0)
        return contrastive(features) + sums

    def backward_of(module: TwoTowers, micro_batch: int | None, others: int | None) -> None:
        def encode(part: Tensor) -> Tensor:
            calls.append(len(part))
            return module.encode_image(part)

        backward(
            loss,
            (module, images, texts),
            Encoder(encode, (more,), micro_batch=others),
            micro_batch=micro_batch,
        )

    whole, ours = model(), model()
    backward_of(whole, None, 7)
    calls.clear()
    backward_of(ours, micro_batch, others)
    same(gradients(ours), gradients(whole))
    assert max(calls) == others and sum(calls) == (7 if others == 7 else 14)


def test_gradients_add_up_as_backward_adds_them() -> None:
    once, twice = model(), model()
    backward(contrastive, (once, *data()), micro_batch=3)
    for _ in range(2):
        backward(contrastive, (twice, *data()), micro_batch=3)
    same(gradients(twice), [None if g is None else 2 * g for g in gradients(once)])


@pytest.mark.parametrize("micro_batch", [2, 7, None])
def test_the_whole_objective_with_class_texts_encoded_once(micro_batch: int | None) -> None:
    """Prototypes, two teachers and gates; the class list is shared by all micro-batches."""
    images, texts = data()
    target = torch.arange(N) % CLASSES
    generator = torch.Generator().manual_seed(3)
    learnable = nn.Parameter(torch.randn(CLASSES, WIDTH, generator=generator).double())

    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=1)

    teachers = [
        Features(unit(N, w), unit(CLASSES, w), torch.tensor(9.0).double(), unit(CLASSES, w))
        for w in (WIDTH, WIDTH + 1)
    ]
    objective = MulKILoss(feature=0.0)

    def parts(module: TwoTowers, calls: list[int]) -> tuple[Callable[..., Any], Encoder, Encoder]:
        def loss(image_features: Tensor, text_features: Tensor) -> Tensor:
            prototypes = F.normalize(learnable, dim=1)
            student = Features(image_features, text_features, module.logit_scale.exp(), prototypes)
            return objective(student, teachers, target)

        def encode_text(tokens: Tensor) -> Tensor:
            calls.append(len(tokens))
            return module.encode_text(tokens)

        return (
            loss,
            Encoder(module.encode_image, (images,)),
            Encoder(encode_text, (texts[:CLASSES],), split=False),
        )

    whole, ours, calls = model(), model(), []
    loss, image, text = parts(whole, [])
    loss(image.function(*image.inputs), text.function(*text.inputs)).backward()
    wanted, learnable.grad = learnable.grad, None
    loss, image, text = parts(ours, calls)
    backward(loss, image, text, micro_batch=micro_batch)
    same(gradients(ours), gradients(whole))
    same([learnable.grad], [wanted])
    assert calls == [CLASSES]


class Noisy(TwoTowers):
    """Draws from all three generators."""

    def encode_image(self, images: Tensor) -> Tensor:
        noise = float(np.random.rand()) + random.random()
        return F.normalize(self.visual(images) + noise, dim=-1)


def test_randomness_of_the_second_pass_repeats_the_first() -> None:
    torch.manual_seed(0)
    noisy = Noisy(dropout=0.5).double()
    seen: list[Tensor] = []
    noisy.visual.register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    backward(contrastive, (noisy, *data()), micro_batch=4)
    first, second = seen[:3], seen[3:]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1][:4])


def test_the_generators_go_on_where_the_first_pass_left_them() -> None:
    def after(step: Callable[[TwoTowers], object]) -> tuple[float, float, float]:
        np.random.seed(0), random.seed(0)
        torch.manual_seed(0)
        module = Noisy(dropout=0.5).double()
        step(module)
        return torch.rand(()).item(), np.random.rand(), random.random()

    def one_pass(module: TwoTowers) -> None:
        with torch.no_grad():
            for images, texts in zip(*[x.split(4) for x in data()], strict=True):
                module(images, texts)

    assert after(lambda m: backward(contrastive, (m, *data()), micro_batch=4)) == after(one_pass)


def test_autocast_weights_of_the_first_pass_are_not_reused() -> None:
    ours, whole = model().float(), model().float()
    inputs = [x.float() for x in data()]
    with torch.autocast("cpu", torch.bfloat16):
        out = whole(*inputs)
        value = contrastive(out)
        backward(contrastive, (ours, *inputs), micro_batch=3)
    value.backward()
    for gradient, wanted in zip(gradients(ours), gradients(whole), strict=True):
        if wanted is not None:
            # bf16 rounds each micro-batch's products of its own.
            torch.testing.assert_close(gradient, wanted, rtol=0.05, atol=5e-3)


def test_a_scaler_scales_the_gradients() -> None:
    plain, scaled = model(), model()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.0)
    value = backward(contrastive, (plain, *data()), micro_batch=3)
    got = backward(contrastive, (scaled, *data()), micro_batch=3, scaler=scaler)
    assert torch.equal(got, value)
    same(gradients(scaled), [None if g is None else 8 * g for g in gradients(plain)])
    scaler.unscale_(optimizer)
    same(gradients(scaled), gradients(plain))


def test_activation_checkpointing_inside() -> None:
    plain, checkpointed = model(), model(checkpointed=True)
    contrastive(plain(*data())).backward()
    backward(contrastive, (checkpointed, *data()), micro_batch=3)
    same(gradients(checkpointed), gradients(plain))


def test_a_frozen_tower_is_left_alone() -> None:
    whole, ours = model(), model()
    for module in (whole, ours):
        module.visual.requires_grad_(False)
    contrastive(whole(*data())).backward()
    backward(contrastive, (ours, *data()), micro_batch=3)
    same(gradients(ours), gradients(whole))
    assert ours.visual[0].weight.grad is None


def test_a_frozen_tower_is_not_encoded_again() -> None:
    """Where nothing but the scale trains, one micro-batch tells its gradient."""
    for scale, calls in ((True, 4 + 2), (False, 4 + 1)):
        whole, ours, rows = model(), model(), []
        for module in (whole, ours):
            module.visual.requires_grad_(False)
            module.text.requires_grad_(False)
            module.logit_scale.requires_grad_(scale)
            module.logit_bias.requires_grad_(scale)
        bias = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))
        ours.visual.register_forward_hook(lambda m, i, out, rows=rows: rows.append(len(out)))
        (contrastive(whole(*data())) * bias).backward()
        wanted, bias.grad = bias.grad, None
        backward(lambda out, bias=bias: contrastive(out) * bias, (ours, *data()), micro_batch=3)
        assert len(rows) == calls
        same([*gradients(ours), bias.grad], [*gradients(whole), wanted])


class Chip:
    """An accelerator with a generator of its own, as far as gradient caching looks at one."""

    drawn = 0

    @classmethod
    def rand(cls) -> float:
        cls.drawn += 1
        return cls.drawn / 7

    @staticmethod
    def is_initialized() -> bool:
        return True

    @classmethod
    def get_rng_state(cls, device: torch.device) -> Tensor:
        assert device == torch.device("cuda:0")
        return torch.tensor(cls.drawn)

    @classmethod
    def set_rng_state(cls, state: Tensor, device: torch.device) -> None:
        cls.drawn = int(state)


def test_inputs_on_the_host_of_an_encoder_on_an_accelerator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The generator of the device that computes is replayed, wherever the inputs are."""
    monkeypatch.setattr(Chip, "drawn", 0)
    chip = torch.device("cuda")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: chip)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch, "get_device_module", lambda device: Chip)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None: empty(*size))
    seen: list[float] = []

    def encode(images: Tensor) -> Tensor:
        seen.append(Chip.rand())
        return images * weight * seen[-1]

    weight = nn.Parameter(torch.ones(8).double())
    backward(lambda x: x.square().sum(), (encode, data()[0]), micro_batch=4)
    assert seen[:3] == seen[3:] and len(set(seen)) == 3
    assert Chip.drawn == 3


@pytest.mark.gpu
def test_memory_of_a_gpu_does_not_grow_with_the_batch() -> None:
    """The images stay on the host, and a dropout on the GPU is replayed."""
    width = 1 << 14
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(width, 64), nn.Dropout(0.5), nn.Linear(64, 8)).cuda()

    def peak(batch: int) -> int:
        images = torch.randn(batch, width).pin_memory()
        layer.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        backward(
            lambda x: F.normalize(x, dim=1).mean(0).square().sum(),
            (lambda part: layer(part.cuda(non_blocking=True)), images),
            micro_batch=64,
        )
        return torch.cuda.max_memory_allocated()

    peak(64)  # the libraries' own memory
    one = peak(64)
    assert peak(64 * 64) <= 1.15 * one
    seen: list[Tensor] = []
    layer[1].register_forward_hook(lambda m, i, out: seen.append(out.detach()))
    peak(4 * 64)
    assert all(torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True))


def saved_bytes(micro_batch: int | None, batch: int) -> int:
    """The most that is kept for backward passes at one time."""
    module = model()
    images, texts = (x.repeat(batch // N + 1, 1)[:batch] for x in data())
    now = peak = 0

    class Kept:
        def __init__(self, tensor: Tensor):
            nonlocal now, peak
            self.tensor, self.size = tensor, tensor.nbytes
            now += self.size
            peak = max(peak, now)

        def __del__(self) -> None:
            nonlocal now
            now -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        backward(
            lambda out: (out["image_features"] * out["text_features"]).sum() * out["logit_scale"],
            (module, images, texts),
            micro_batch=micro_batch,
        )
    return peak


def test_what_is_kept_is_that_of_a_micro_batch() -> None:
    features = 8 * 2 * WIDTH * 8 * 4  # both towers' features of the large batch, and products
    one, large = saved_bytes(None, 40), saved_bytes(40, 40 * 8)
    assert large <= one + features * 40 / 2
    assert saved_bytes(None, 40 * 8) > 6 * one


def test_bad_arguments() -> None:
    images, texts = data()
    module = model()
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "micro_batch: got 0",
         lambda: backward(contrastive, (module, images, texts), micro_batch=0)),
        (TypeError, "micro_batch: got float",
         lambda: backward(contrastive, (module, images, texts), micro_batch=2.0)),
        (ValueError, r"encoders\[0\]: got inputs that were computed with gradients",
         lambda: backward(
             contrastive, (module, images.requires_grad_().tanh(), texts), micro_batch=2)),
        (ValueError, "encoders: got none", lambda: backward(contrastive, micro_batch=2)),
        (ValueError, r"encoders\[0\]: got inputs of 10, 9 rows",
         lambda: backward(contrastive, (module, images, texts[:9]), micro_batch=2)),
        (ValueError, r"encoders\[1\]: got 9 samples beside 10; use Encoder\(..., split=False\)",
         lambda: backward(
             contrastive, (module.encode_image, images), (module.encode_text, texts[:9]),
             micro_batch=2)),
        (ValueError, "micro_batch: got -1, wanted at least 1",
         lambda: backward(
             contrastive, Encoder(module.encode_image, (images,), micro_batch=-1),
             micro_batch=2)),
        (ValueError, r"encoders\[0\]: got no samples",
         lambda: backward(contrastive, (module, images[:0], texts[:0]), micro_batch=None)),
        (TypeError, r"encoders\[0\]: got Tensor as its function",
         lambda: backward(contrastive, (images, texts), micro_batch=2)),
        (TypeError, r"encoders\[0\]: wanted inputs that are tensors",
         lambda: backward(contrastive, (module, [1, 2]), micro_batch=2)),
        (TypeError, r"^inputs: got Tensor, wanted a tuple of tensors; write \(x,\)",
         lambda: Encoder(module.encode_text, texts, split=False)),  # type: ignore[arg-type]
        (TypeError, r"encoders\[0\]: got Sequential, wanted an Encoder or \(function",
         lambda: backward(contrastive, module.visual, micro_batch=2)),
        (TypeError, r"encoders\[0\]: got tuple, wanted an Encoder",
         lambda: backward(contrastive, (), micro_batch=2)),
        (TypeError, r"loss: returned shape \[10\], wanted a scalar",
         lambda: backward(lambda out: out["image_features"].sum(1), (module, images, texts),
                          micro_batch=2)),
        (TypeError, "loss: returned NoneType for 'kl', wanted a scalar",
         lambda: backward(lambda out: {"kl": None}, (module, images, texts), micro_batch=None)),
        (TypeError, "loss: returned an empty dict",
         lambda: backward(lambda out: {}, (module, images, texts), micro_batch=2)),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.parametrize("micro_batch", [4, 5])
@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda x: x.new_ones(7, 3), r"got an output of shape \[7, 3\] for . samples.*split=False"),
        (lambda x: x.sum(dim=1), r"of shape \[.\] is not the same.*two dimensions, \[n, 1\]"),
        (lambda x: x.argmax(dim=1), r"of shape \[.\] is not the same"),
        (lambda x: x.square().mean(), r"of shape \[\] is not the same.*compute .* in the loss"),
    ],
)
def test_outputs_that_cannot_be_joined(
    output: Callable[[Tensor], Tensor], message: str, micro_batch: int
) -> None:
    """One per sample needs a row; what belongs to the whole batch cannot differ within it."""
    images, _ = data()
    layer = nn.Linear(8, 3).double()

    def encode(part: Tensor) -> tuple[Tensor, Tensor]:
        return layer(part), output(part)

    with pytest.raises(ValueError, match=r"encoders\[0\]: .*" + message):
        backward(lambda out: out[0].sum(), (encode, images), micro_batch=micro_batch)
    assert layer.weight.grad is None


def test_batch_statistics_are_warned_of() -> None:
    module = nn.Sequential(nn.Linear(8, WIDTH), nn.BatchNorm1d(WIDTH)).double()
    images, _ = data()
    with pytest.warns(UserWarning, match="batch normalisation"):
        backward(lambda x: x.square().sum(), (module, images), micro_batch=5)
    module.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(lambda x: x.square().sum(), (module, images), micro_batch=5)
