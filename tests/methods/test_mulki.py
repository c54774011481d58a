from __future__ import annotations

import inspect
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from mulki import methods
from mulki.clip.features import of_reference
from mulki.errors import InputError
from mulki.losses import MulKILoss
from mulki.methods import PREVIOUS, SEEN, VOCABULARY, ZERO_SHOT
from mulki.methods.finetune import Finetune
from mulki.methods.mulki import MulKI
from mulki.ops.gates import Weighting
from mulki.train.config.presets import RELATIONS
from tests.methods.method_helpers import add, start

# The relations on the task's own images, weighted as by default in the objective.
PAPER = RELATIONS | {"gate": "uniform"}
BOTH = (ZERO_SHOT, PREVIOUS)
ALL_TERMS = {
    "ce_loss",
    "alignment_loss",
    "image_text_loss",
    "image_image_loss",
    "text_image_loss",
    "text_text_loss",
    "feature_loss",
}


class TestMulKI:
    def losses(self, student, teachers, target, **options):
        method = MulKI(MulKI.Options(**PAPER | options))
        if not method.needs.prototypes:
            student, *teachers = (replace(m, prototypes=None) for m in (student, *teachers))
        given = tuple(teachers) if method.needs.teachers else ()
        return method, method.losses(student, given, target)

    def test_is_the_objective_of_its_options(self, student, teachers, target):
        method, losses = self.losses(student, teachers, target)
        assert method.needs == methods.Needs(
            BOTH, caption_teachers=BOTH, prototypes=True, anchors=(VOCABULARY,)
        )
        expected = MulKILoss()(student, teachers, target, output_dict=True)
        assert set(losses) == ALL_TERMS
        for name, value in expected.items():
            assert losses[name] == value

    def test_by_default_it_holds_made_images(self, student, teachers, target, unit, with_anchors):
        method = MulKI(MulKI.Options())
        assert method.needs == methods.Needs(
            BOTH,
            caption_teachers=BOTH,
            teacher_images=False,
            prototypes=True,
            reference=True,
            captions=False,
            anchors=(VOCABULARY,),
        )
        student, *teachers = (
            with_anchors(replace(model, reference=of_reference(unit(3, 5), None, model.scale)))
            for model in (student, *teachers)
        )
        teachers = [replace(t, images=t.images[:0], prototypes=None) for t in teachers]
        losses = method.losses(student, tuple(teachers), target)
        off = dict.fromkeys(("image_text", "image_image", "text_image"), 0.0)
        objective = MulKILoss(
            hold_on="made",
            gate="discrepancy",
            feature=9.0,
            feature_original=0.5,
            image_anchor=0.5,
            text_text=0.25,
            **off,
        )
        assert losses == objective(student, teachers, target, output_dict=True)
        held = {"text_text_loss", "image_anchor_loss", "feature_loss"}
        assert set(losses) == {"ce_loss", "alignment_loss"} | held

    def test_every_option_of_the_objective_is_passed_on(self, student, teachers, target):
        options = {
            "temperature": 3.0,
            "gate": "confidence",
            "gate_temperature": 0.5,
            "label_smoothing": 0.1,
            "alignment": 0.1,
            "image_text": 0.2,
            "image_image": 0.3,
            "text_image": 0.4,
            "text_text": 0.5,
            "feature": 0.6,
        }
        _, losses = self.losses(student, teachers, target, **options)
        expected = MulKILoss(**options)(student, teachers, target, output_dict=True)
        assert losses == expected

    @pytest.mark.parametrize(
        ("stage", "removed"),
        [
            ("eliciting", {"alignment_loss", "image_image_loss", "text_image_loss"}),
            ("adding", ALL_TERMS - {"ce_loss", "alignment_loss"}),
            ("distinguishing", set()),
            ("connecting", set()),
        ],
    )
    def test_a_stage_switched_off_removes_its_terms_alone(
        self, student, teachers, target, stage, removed
    ):
        _, whole = self.losses(student, teachers, target)
        method, losses = self.losses(student, teachers, target, **{stage: False})
        assert set(losses) == ALL_TERMS - removed
        if stage != "distinguishing":
            assert all(value == whole[name] for name, value in losses.items())
        assert method.needs.teachers == (() if stage == "adding" else (ZERO_SHOT, PREVIOUS))
        assert method.needs.prototypes == (stage != "eliciting")

    def test_anchors_are_asked_for_by_group(self):
        for anchors, groups in (
            ("seen", (SEEN,)),
            ("vocabulary", (VOCABULARY,)),
            ("both", (SEEN, VOCABULARY)),
        ):
            method = MulKI(MulKI.Options(anchors=anchors))
            assert method.needs.anchors == groups and not method.needs.student_anchors
            method = MulKI(MulKI.Options(anchors=anchors, anchor_texts="student"))
            assert method.needs.anchors == groups and method.needs.student_anchors
        for off in ({"adding": False}, {"image_anchor": 0.0}, {"anchors": "none"}):
            options = {"anchors": "both", "anchor_texts": "student"} | off
            needs = MulKI(MulKI.Options(**options)).needs
            assert needs.anchors == () and not needs.student_anchors

    def test_options_of_anchors_and_prototypes_are_passed_on(
        self, student, teachers, target, with_anchors
    ):
        student, *teachers = (with_anchors(model) for model in (student, *teachers))
        options = {
            "image_anchor": 0.5,
            "text_anchor": 0.7,
            "anchor_texts": "student",
            "anchor_weights": "group",
            "prototype": 0.3,
        }
        _, losses = self.losses(student, teachers, target, anchors="both", **options)
        expected = MulKILoss(**options)(student, teachers, target, output_dict=True)
        assert losses == expected
        assert {"image_anchor_loss", "text_anchor_loss", "prototype_loss"} < set(losses)

    @pytest.mark.parametrize("adding", [True, False])
    def test_options_of_captions_are_passed_on(self, student, teachers, adding):
        student, *teachers = (replace(m, texts=m.images.flip(0)) for m in (student, *teachers))
        options = {"image_caption": 0.7, "feature": 0.6, "feature_original": 0.3}
        method = MulKI(MulKI.Options(adding=adding, **options))
        needs = method.needs.without_classes()
        assert needs == methods.Needs(BOTH if adding else ())
        losses = method.pair_losses(student, tuple(teachers) if adding else (), None)
        expected, _ = MulKILoss(gate="discrepancy", **options).pair_terms(student, teachers)
        kept = {"contrastive_loss"} | ({"image_caption_loss", "feature_loss"} if adding else set())
        assert losses == {name: value for name, value in expected.items() if name in kept}
        assert set(losses) == kept

    def test_the_relation_to_captions_alone_asks_for_teachers(self):
        off = dict.fromkeys(("text_text", "image_anchor", "feature", "feature_original"), 0.0)
        for coefficient, teachers in ((0.25, BOTH), (0.0, ())):
            method = MulKI(MulKI.Options(image_caption=coefficient, **off))
            assert method.needs.teachers == () and not method.needs.reference
            assert method.needs.without_classes().teachers == teachers

    @pytest.mark.parametrize("name", [ZERO_SHOT, PREVIOUS])
    def test_one_teacher_alone(self, student, teachers, target, name):
        # The default of --gate, which is for both, counts as not given.
        method = MulKI(MulKI.Options(teachers=name, **RELATIONS))
        assert method.needs.teachers == (name,)
        losses = method.losses(student, teachers[:1], target)
        expected = MulKILoss(gate="uniform")(student, teachers[:1], target, output_dict=True)
        assert losses == expected
        objective = MulKI(MulKI.Options(teachers=name)).objective
        coefficient = 0.5 if name == "zero_shot" else 9.0
        assert objective.feature == (coefficient, coefficient)
        assert objective.weighting == Weighting.of("uniform")
        MulKI(MulKI.Options(teachers=name, gate="uniform", feature_original=None))

    def test_held_on_made_images_it_needs_a_reference_set(self):
        for hold_on in ("made", "both"):
            needs = MulKI(MulKI.Options(hold_on=hold_on)).needs
            assert needs.reference and not needs.captions
            # The captions of pairs are encoded, though the made images have none.
            assert needs.without_classes() == methods.Needs(BOTH)
        assert not MulKI(MulKI.Options(hold_on="made", adding=False)).needs.reference
        for gate in ("label", "loss"):
            with pytest.raises(InputError, match=f"^--gate: got {gate}, .* pass --hold-on task"):
                MulKI(MulKI.Options(hold_on="made", gate=gate))
            MulKI(MulKI.Options(hold_on="made", gate=gate, distinguishing=False))
            MulKI(MulKI.Options(hold_on="task", gate=gate))

    def test_a_coefficient_for_the_original_model(self, student, teachers, target):
        options = {"feature": 9.0, "feature_original": 0.5}
        _, losses = self.losses(student, teachers, target, **options)
        assert losses == MulKILoss(**options)(student, teachers, target, output_dict=True)
        with pytest.raises(InputError, match="^--feature-original: got 0.3 beside --teachers"):
            MulKI(MulKI.Options(teachers="previous", feature_original=0.3))
        alone = MulKI(MulKI.Options(teachers="zero_shot", feature_original=0.3))
        assert alone.objective.feature == (0.3, 0.3)
        with pytest.raises(
            InputError, match="^--feature: got 3 beside --teachers zero_shot, whose"
        ):
            MulKI(MulKI.Options(teachers="zero_shot", feature=3.0))
        alone = MulKI(MulKI.Options(teachers="zero_shot", feature=3.0, feature_original=None))
        assert alone.objective.feature == (3.0, 3.0)

    @pytest.mark.parametrize("name", [ZERO_SHOT, PREVIOUS])
    def test_a_gate_needs_both(self, name):
        with pytest.raises(InputError, match=f"^--gate: got label beside --teachers {name}"):
            MulKI(MulKI.Options(teachers=name, gate="label"))

    def test_a_teacher_for_each_group_needs_both(self):
        with pytest.raises(InputError, match="^--anchor-weights: got group beside --teachers prev"):
            MulKI(MulKI.Options(teachers="previous", anchor_weights="group"))

    def test_the_update_batch_sends_gradients_to_images(self, student, teachers, target, weights):
        grads = {}
        for update in ("ema", "batch"):
            initial = student.prototypes.detach()
            options = MulKI.Options(prototype_update=update, adding=False)
            method = start(MulKI(options), weights, initial)
            of_batch = replace(student, prototypes=method.prototypes())
            loss = method.losses(of_batch, (), target)["alignment_loss"]
            grads[update] = torch.autograd.grad(loss, student.images, allow_unused=True)[0]
        assert grads["ema"] is None
        assert grads["batch"].abs().max() > 1e-4

    def test_without_distinguishing_both_teachers_count_equally(self, student, teachers, target):
        _, losses = self.losses(student, teachers, target, distinguishing=False)
        _, uniform = self.losses(student, teachers, target, gate="uniform")
        _, gated = self.losses(student, teachers, target, gate="label")
        _, off = self.losses(student, teachers, target, gate="label", distinguishing=False)
        assert losses == uniform == off
        assert losses["image_text_loss"] != gated["image_text_loss"]

    def test_with_every_stage_off_it_is_finetune(self, student, teachers, target, weights):
        stages = ("eliciting", "adding", "distinguishing", "connecting")
        method, losses = self.losses(student, teachers, target, **dict.fromkeys(stages, False))
        expected = Finetune(Finetune.Options()).losses(student, (), target)
        assert losses == expected
        assert method.needs == methods.Needs(caption_teachers=())
        without = MulKI(MulKI.Options(**dict.fromkeys(stages, False)))
        assert without.needs == methods.Needs(caption_teachers=(), teacher_images=False)

    def test_prototypes_move_after_the_losses_of_a_batch(self, student, teachers, target, weights):
        initial = student.prototypes.detach().clone()
        method = start(MulKI(MulKI.Options(prototype_momentum=0.8, **PAPER)), weights, initial)
        before = method.prototypes()
        student = replace(student, prototypes=before)
        losses = method.losses(student, teachers, target)
        assert losses == MulKILoss()(student, teachers, target, output_dict=True)
        assert before.equal(initial)
        for c in range(3):
            mean = student.images[target == c].mean(dim=0).detach()
            expected = F.normalize(0.8 * initial[c] + 0.2 * mean, dim=0)
            torch.testing.assert_close(method.prototypes()[c], expected)
        sum(losses.values()).backward()
        assert student.images.grad.isfinite().all()

    def test_learnable_prototypes_train_beside_the_student(
        self, student, teachers, target, weights
    ):
        method = MulKI(MulKI.Options(prototype_update="learnable", **PAPER))
        assert not list(method.parameters())
        start(method, weights, student.prototypes.detach())
        (parameter,) = method.parameters()
        student = replace(student, prototypes=method.prototypes())
        sum(method.losses(student, teachers, target).values()).backward()
        assert parameter.grad.abs().max() > 1e-3

    def test_a_task_starts_afresh(self, student, teachers, target, weights):
        options = MulKI.Options(we_every=1, **PAPER)
        method = start(MulKI(options), weights, student.prototypes.detach())
        method.losses(student, teachers, target)
        add(weights, 1.0)
        method.after_step(1)
        start(method, weights, 2 * student.prototypes.detach(), index=1)
        assert method.prototypes().equal(2 * student.prototypes.detach())
        method.end_task()
        assert weights["a"].tolist() == [2, 2, 2]

    def test_a_display_sees_weights_of_teachers_and_drift(self, student, teachers, target, weights):
        method = MulKI(MulKI.Options(prototype_momentum=0.5, **PAPER))
        assert method.watched() == {}
        first = student.prototypes.detach()
        start(method, weights, first)
        assert set(method.watched()) == {"prototype_drift"}
        assert method.watched()["prototype_drift"].abs().max() < 1e-6
        method.losses(student, teachers, target)
        found = method.watched()
        _, expected = MulKILoss().terms(replace(student, prototypes=first), teachers, target)
        assert torch.equal(found["teacher_weights"], expected)
        assert not any(value.requires_grad for value in found.values())
        moved = 1 - (method.prototypes() * F.normalize(first, dim=1)).sum(dim=1)
        torch.testing.assert_close(found["prototype_drift"], moved)
        assert moved.max() > 1e-3
        method.end_task()
        assert method.watched() == {}

    def test_the_running_mean_becomes_the_weights(self, weights):
        method = start(MulKI(MulKI.Options(we_every=2)), weights)
        for step in range(1, 5):
            add(weights, 1.0)
            method.after_step(step)
        live = weights["a"]
        method.end_task()
        # The start at 1 and the weights after steps 2 and 4, at 3 and 5.
        assert weights["a"] is live
        assert live.tolist() == [3, 3, 3]
        assert weights["b"] == 2

    def test_a_task_too_short_for_the_running_mean_keeps_its_last_weights(self, weights):
        method = start(MulKI(MulKI.Options(we_every=10)), weights)
        add(weights, 1.0)
        method.after_step(1)
        method.end_task()
        assert weights["a"].tolist() == [2, 2, 2]

    @pytest.mark.parametrize(("we_every", "expected"), [(0, 1 + 0.25 * 4), (2, 1 + 0.25 * 2)])
    def test_alpha_interpolates_from_the_previous_model(self, weights, we_every, expected):
        method = start(MulKI(MulKI.Options(we_every=we_every, alpha=0.25)), weights)
        for step in range(1, 5):
            add(weights, 1.0)
            method.after_step(step)
        method.end_task()
        assert weights["a"].tolist() == [expected] * 3

    def test_the_anchor_pulls_to_the_previous_weights(self, weights):
        method = start(MulKI(MulKI.Options(l2=0.5)), weights)
        add(weights, 2.0)
        (loss,) = method.penalties().values()
        assert list(method.penalties()) == ["anchor_loss"]
        assert loss == 0.5 * 4 * 2.0**2
        loss.backward()
        assert weights["a"].grad.tolist() == [2, 2, 2]

    def test_there_is_no_anchor_by_default(self, weights):
        assert start(MulKI(MulKI.Options()), weights).penalties() == {}

    def test_without_connecting_the_last_weights_stay(self, weights):
        options = MulKI.Options(connecting=False, we_every=1, alpha=0.1, l2=3.0)
        method = start(MulKI(options), weights)
        add(weights, 1.0)
        method.after_step(1)
        assert method.penalties() == {}
        method.end_task()
        assert weights["a"].tolist() == [2, 2, 2]


def test_the_objective_has_the_defaults_of_the_relations() -> None:
    signature = inspect.signature(MulKILoss).parameters
    paper, default = MulKI.Options(**PAPER), MulKI.Options()
    for name, parameter in signature.items():
        assert getattr(paper, name) == parameter.default, name
        assert name in PAPER or getattr(default, name) == parameter.default, name
    assert default.image_caption == 0.25 and default.label_smoothing == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gate": "blend"}, "^--gate-entropy: got NoneType"),
        ({"gate": "blend", "gate_entropy": 1.0}, "^--gate-label: got NoneType"),
        ({"gate_label": 0.5}, '^--gate-label: got 0.5 with gate="discrepancy"'),
        ({"gate": "uniform", "gate_label": 0.5}, '^--gate-label: got 0.5 with gate="uniform"'),
        ({"gate_temperature": 0.5}, "^--gate-temperature: got 0.5 with --gate discrepancy"),
        (
            {"gate": "uniform", "gate_temperature": 0.5},
            "^--gate-temperature: got 0.5 with --gate uniform",
        ),
        (
            {"gate": "loss", "hold_on": "task", "gate_temperature": 0.5},
            "^--gate-temperature: got 0.5 with --gate loss",
        ),
    ],
)
def test_numbers_of_a_gate_that_do_not_fit_it(options, said):
    with pytest.raises(InputError, match=said):
        MulKI(MulKI.Options(**options))
