"""All methods: their names, their options with bounds and defaults."""

from __future__ import annotations

from dataclasses import fields

import pytest

from mulki import methods
from mulki.errors import InputError
from mulki.methods.er import ER
from mulki.methods.ewc import EWC
from mulki.methods.finetune import Finetune
from mulki.methods.keeplora import KeepLoRA
from mulki.methods.lwf import LwF
from mulki.methods.lwf_vr import LwFVR
from mulki.methods.mulki import MulKI
from mulki.methods.snd import SnD
from mulki.methods.wise_ft import WiseFT
from mulki.methods.zero_shot import ZeroShot
from mulki.methods.zscl import ZSCL


class TestRegistry:
    def test_finds_the_methods(self):
        assert methods.available() == {
            "er": ER,
            "ewc": EWC,
            "finetune": Finetune,
            "keeplora": KeepLoRA,
            "lwf": LwF,
            "lwf_vr": LwFVR,
            "mulki": MulKI,
            "snd": SnD,
            "wise_ft": WiseFT,
            "zero_shot": ZeroShot,
            "zscl": ZSCL,
        }
        assert methods.get("lwf") is LwF

    def test_one_that_inherits_from_two(self):
        class Both(LwF, Finetune):
            name = "both"
            summary = "of two methods"

        assert methods.get("both") is Both
        del Both.name

    def test_an_unknown_name_gets_the_nearest(self):
        with pytest.raises(InputError, match="'MULKY' .*\"mulki\".*er, ewc, .*keeplora, lwf"):
            methods.get("MULKY")
        with pytest.raises(InputError, match="^--method: .*'xyz'"):
            methods.get("xyz")

    @pytest.mark.parametrize("name", methods.available())
    def test_every_method_and_option_is_described(self, name):
        method = methods.get(name)
        assert method.summary
        for item in fields(method.Options):
            assert item.metadata["help"], item.name


@pytest.mark.parametrize(
    ("method", "name", "bad", "good"),
    [
        (ER, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (ER, "buffer_size", (0,), (1,)),
        (ER, "buffer", ("random",), ("balanced", "reservoir")),
        (ER, "replay_batch_size", (0,), (1, None)),
        (ER, "replay_weight", (-0.1,), (0.0,)),
        (EWC, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (EWC, "ewc_lambda", (-0.1,), (0.0,)),
        (EWC, "ewc_decay", (-0.1, 1.1), (0.0, 1.0)),
        (EWC, "fisher_images", (0,), (1,)),
        (Finetune, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (LwF, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (LwF, "distill_weight", (-0.1,), (0.0,)),
        (LwF, "temperature", (0.0, -1.0), (0.1,)),
        (LwFVR, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (LwFVR, "distill_weight", (-0.1,), (0.0,)),
        (LwFVR, "temperature", (0.0, -1.0), (0.1,)),
        (SnD, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (SnD, "previous_weight", (-0.1,), (0.0,)),
        (SnD, "zero_shot_weight", (-0.1,), (0.0,)),
        (WiseFT, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (WiseFT, "alpha", (0.0, 1.1, float("nan")), (0.1, 1.0)),
        (WiseFT, "wise_base", ("original",), ("previous", "zero_shot")),
        (ZSCL, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (ZSCL, "image_loss", (-0.1,), (0.0,)),
        (ZSCL, "text_loss", (-0.1,), (0.0,)),
        (ZSCL, "temperature", (0.0, -1.0), (0.1,)),
        (ZSCL, "teacher", ("original",), ("zero_shot", "previous")),
        (ZSCL, "we_every", (-1,), (0, 1)),
        (ZSCL, "l2", (-0.1,), (0.0,)),
        (MulKI, "label_smoothing", (-0.1, 1.1), (0.0, 1.0)),
        (MulKI, "temperature", (0.0, -1.0), (0.1,)),
        (MulKI, "prototype_update", ("mean",), ("ema", "learnable", "fixed")),
        (MulKI, "prototype_momentum", (-0.1, 1.1), (0.0, 1.0)),
        (MulKI, "alignment", (-0.1,), (0.0,)),
        (MulKI, "image_text", (-0.1,), (0.0,)),
        (MulKI, "image_image", (-0.1,), (0.0,)),
        (MulKI, "text_image", (-0.1,), (0.0,)),
        (MulKI, "text_text", (-0.1,), (0.0,)),
        (MulKI, "image_anchor", (-0.1,), (0.0,)),
        (MulKI, "image_caption", (-0.1,), (0.0,)),
        (MulKI, "feature", (-0.1,), (0.0,)),
        (MulKI, "feature_original", (-0.1,), (0.0, None)),
        # Those that look at the label want another --hold-on, see test_mulki.py.
        (MulKI, "gate", ("lable",), ("uniform", "confidence", "discrepancy")),
        (MulKI, "gate_temperature", (0.0,), (1.0,)),
        (MulKI, "we_every", (-1,), (0, 1)),
        (MulKI, "alpha", (0.0, 1.1, float("nan")), (0.1, 1.0)),
        (MulKI, "l2", (-0.1,), (0.0,)),
    ],
)
def test_bounds_of_options(method, name, bad, good):
    for value in bad:
        with pytest.raises(InputError, match=f"^--{name.replace('_', '-')}: got '?{value}"):
            method(method.Options(**{name: value}))
    for value in good:
        method(method.Options(**{name: value}))


def test_defaults_that_methods_share():
    for method in (ER, EWC, Finetune, KeepLoRA, LwF, LwFVR, MulKI, SnD, WiseFT, ZSCL):
        assert method.Options().label_smoothing == 0
    assert LwF.Options().temperature == MulKI.Options().temperature == 2.0
    assert ZSCL.Options().temperature == 2.0
