"""What a method inherits that does not define it."""

from __future__ import annotations

import pytest

from mulki import methods
from mulki.methods import PREVIOUS, SEEN, VOCABULARY, ZERO_SHOT, Needs
from mulki.methods.finetune import Finetune
from mulki.methods.lwf import LwF
from mulki.methods.lwf_vr import LwFVR
from mulki.methods.zero_shot import ZeroShot
from tests.methods.method_helpers import add, start


@pytest.mark.parametrize("method", [Finetune, LwF, LwFVR, ZeroShot])
def test_baselines_have_no_state_and_leave_weights_alone(method, weights):
    made = start(method(method.Options()), weights)
    add(weights, 1.0)
    made.after_step(1)
    made.end_task()
    assert not made.state_dict() and not list(made.parameters())
    assert made.penalties() == {} and made.prototypes() is None
    assert weights["a"].tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("needs", "uses"),
    [
        (Needs((ZERO_SHOT, PREVIOUS), prototypes=True), ()),
        (
            Needs(anchors=(VOCABULARY, SEEN)),
            ("class names of earlier tasks", "a vocabulary of words"),
        ),
        (Needs(reference=True, student_captions=False), ("reference images and captions",)),
        (Needs(reference=True, captions=False), ("reference images",)),
        (
            Needs(reference=True, anchors=(VOCABULARY,)),
            ("a vocabulary of words", "reference images and captions"),
        ),
    ],
)
def test_what_a_method_uses_beyond_the_task(needs, uses):
    assert needs.uses == uses


def test_a_method_takes_captions_if_it_has_their_losses() -> None:
    taken = {name for name, method in methods.available().items() if method.takes_captions()}
    assert {"finetune", "mulki", "wise_ft", "zero_shot"} <= taken
    assert not taken & {"er", "ewc", "lwf", "lwf_vr", "snd", "zscl"}
    lwf = methods.get("lwf")
    with pytest.raises(TypeError, match="method lwf "):
        lwf(lwf.Options()).pair_losses(None, (), None)  # type: ignore[arg-type]
