"""What all losses over pairs check, on all ranks together, and what they warn of."""

from __future__ import annotations

import warnings

import pytest
import torch

from mulki.losses import ClipLoss, DistillClipLoss, DualTeacherClipLoss, SigLipLoss
from tests.losses.two_towers import OURS, TwoTowers, batch, extra, outputs
from tests.ranks import run_ranks


def test_rows_that_are_not_normalised_are_warned_of_once():
    _, out = outputs("dual")
    out["prev_text_features"] = 3 * out["prev_text_features"]
    loss = DualTeacherClipLoss()
    with pytest.warns(UserWarning, match=r"prev_text_features: got rows of norm 3 to 3, wanted 1"):
        loss(**out)
    out["image_features"] = 2 * out["image_features"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(**out)
        half = {
            k: v.to(torch.bfloat16) if "features" in k else v for k, v in outputs("dual")[1].items()
        }
        DualTeacherClipLoss()(**half)  # rounding is no reason


def test_shapes_alone_are_enough():
    for kind in OURS:
        arguments = {
            name: value.detach().to("meta") if torch.is_tensor(value) and value.dim() else value
            for name, value in outputs(kind)[1].items()
        }
        found = OURS[kind]()(**arguments)
        assert all(loss.is_meta for loss in (found if isinstance(found, tuple) else (found,)))


@pytest.mark.parametrize(
    ("kind", "change", "error", "message"),
    [
        ("clip", {"image_features": [1.0]}, TypeError, "image_features: got list"),
        ("clip", {"image_features": torch.ones(6)}, ValueError, "image_features: got shape"),
        ("clip", {"text_features": torch.ones(5, 5)}, ValueError, "text_features: got shape"),
        ("clip", {"text_features": torch.ones(6, 4)}, ValueError, "text_features: got shape"),
        ("clip", {"logit_scale": torch.ones(2)}, ValueError, "logit_scale: got shape"),
        ("siglip", {"logit_bias": "high"}, TypeError, "logit_bias: got str"),
        ("distill", {"dist_text_features": torch.ones(6, 3)}, ValueError, "dist_text_features"),
        ("distill", {"dist_text_features": None}, TypeError, "dist_text_features: got NoneType"),
        ("distill", {"dist_logit_scale": None}, TypeError, "dist_logit_scale: got NoneType"),
        ("dual", {"prev_logit_scale": torch.ones(3)}, ValueError, "prev_logit_scale: got shape"),
    ],
)
def test_what_does_not_fit_is_named(kind, change, error, message):
    _, out = outputs(kind, dtype=torch.float32)
    with pytest.raises(error, match=message):
        OURS[kind]()(**out | change)


@pytest.mark.parametrize(
    ("loss", "shown"),
    [
        (ClipLoss(), "ClipLoss()"),
        (ClipLoss(True, rank=0, world_size=1), "ClipLoss(local_loss=True, rank=0, world_size=1)"),
        (SigLipLoss(dist_impl="gather"), "SigLipLoss(dist_impl='gather')"),
        (DistillClipLoss(temperature=3.0), "DistillClipLoss(temperature=3.0)"),
        (DualTeacherClipLoss(gate="uniform"), "DualTeacherClipLoss(gate='uniform')"),
        (
            DualTeacherClipLoss(gate="blend", gate_entropy=0.5, gate_label=1.0),
            "DualTeacherClipLoss(gate='blend', gate_entropy=0.5, gate_label=1.0)",
        ),
    ],
)
def test_a_loss_shows_its_arguments(loss, shown):
    assert repr(loss) == shown


def test_a_teacher_of_another_batch_is_refused():
    _, out = outputs("distill")
    for name in ("dist_image_features", "dist_text_features"):
        out[name] = out[name][:4]
    with pytest.raises(ValueError, match="dist_image_features: got 4 rows, wanted 6"):
        DistillClipLoss()(**out)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_no_pairs_are_refused(kind):
    _, out = outputs(kind, n=0)
    with pytest.raises(ValueError, match="got no rows on any rank"):
        OURS[kind]()(**out)


@pytest.mark.parametrize(("name", "value"), [("rank", 1), ("world_size", 2)])
def test_ranks_without_a_process_group_are_refused(name, value):
    _, out = outputs("clip")
    with pytest.raises(ValueError, match=f"^{name}: got {value}"):
        ClipLoss(**{name: value})(**out)


def refused(rank: int, world: int, call) -> tuple[str, str]:
    try:
        call()
    except (TypeError, ValueError) as error:
        return type(error).__name__, str(error)
    return "", "nothing was raised"


def disagree(rank: int, world: int) -> dict[str, tuple[str, str]]:
    """Each case differs on the last rank alone."""
    last = rank == world - 1
    images, texts = batch(3)
    out = TwoTowers()(images.float(), texts.float())
    del out["logit_bias"]
    plain = {name: v.detach() for name, v in out.items()}
    narrow = plain | {n: v[:, :4] for n, v in plain.items() if v.ndim == 2}
    half = plain | {n: v.bfloat16() for n, v in plain.items() if v.ndim == 2}
    unpaired = plain | {"text_features": plain["text_features"][:2]}
    distill = plain | extra("distill", images.float(), texts.float())
    untaught = distill | {"dist_image_features": None}
    cases = {
        "width": lambda: ClipLoss()(**(narrow if last else plain)),
        "dtype": lambda: ClipLoss()(**(half if last else plain)),
        "grad": lambda: ClipLoss()(**(plain if last else out)),
        "pairs": lambda: ClipLoss()(**(unpaired if last else plain)),
        "rank": lambda: ClipLoss(rank=0 if last else rank, world_size=world)(**plain),
        "world": lambda: ClipLoss(rank=rank, world_size=7)(**plain),
        "impl": lambda: SigLipLoss(dist_impl="shift" if last else None)(**plain, logit_bias=None),
        "loss": lambda: SigLipLoss()(**plain, logit_bias=None) if last else ClipLoss()(**plain),
        "teacher": lambda: DistillClipLoss()(**(untaught if last else distill)),
        "none": lambda: ClipLoss()(**{n: v[:0] if v.ndim else v for n, v in plain.items()}),
    }
    said = {name: refused(rank, world, call) for name, call in cases.items()}
    ClipLoss()(**plain)  # and the group still works
    return said


def test_ranks_that_disagree_all_raise_the_same():
    said = run_ranks(3, disagree)
    assert said[0] == said[1] == said[2]
    kinds = {name: kind for name, (kind, _) in said[0].items()}
    types = ("dtype", "teacher")
    assert kinds == {name: "TypeError" if name in types else "ValueError" for name in kinds}
    messages = {name: message for name, (_, message) in said[0].items()}
    assert messages["width"] == (
        "image_features width: got 5 on ranks 0, 1, 4 on rank 2, wanted the same on all ranks"
    )
    assert messages["dtype"].startswith("image_features dtype: got float32 on ranks 0, 1, bfloat16")
    assert "require grad: got yy on ranks 0, 1, nn on rank 2" in messages["grad"]
    assert messages["pairs"].startswith("on rank 2: text_features: got shape [2, 5]")
    assert messages["rank"].startswith("on rank 2: rank: got 0, but the process group has rank 2")
    assert "world_size: got 7, but the process group has world_size 3" in messages["world"]
    assert "dist_impl: got bidir on ranks 0, 1, shift on rank 2" in messages["impl"]
    assert "loss: got ClipLoss on ranks 0, 1, SigLipLoss on rank 2" in messages["loss"]
    assert messages["teacher"].startswith("on rank 2: dist_image_features: got NoneType")
    assert "no rows on any rank" in messages["none"]


def test_a_subclass_whose_changes_would_not_count_is_refused():
    with pytest.raises(TypeError, match=r"Margin: forward does not call get_logits.*; define f"):

        class Margin(ClipLoss):
            def get_logits(self, *features, **options):
                return super().get_logits(*features, **options)

    class Own(ClipLoss):
        def forward(self, *features, **options):
            return sum(self.get_logits(*features)).mean()

    class Further(Own):
        def get_logits(self, *features, **options):
            return super().get_logits(*features, **options)
