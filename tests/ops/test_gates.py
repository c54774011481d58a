"""Gates: numbers of the row-wise ones, functions of the others, and how one more comes in."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mulki import Similarity
from mulki.functional import dual_teacher_kl, teacher_kl
from mulki.losses import DualTeacherClipLoss, MulKILoss
from mulki.ops import gates
from mulki.ops.gates import GATES, Gate, find_gate, gate_names, register_gate

N, P, D = 6, 5, 4
TARGET = torch.tensor([0, 1, 2, 3, 4, 0])


@pytest.fixture
def models(unit):
    """A student and two teachers of one width."""
    return [Similarity(unit(N, D), unit(P, D), scale) for scale in (9.0, 7.0, 5.0)]


@pytest.fixture
def extra_gate():
    """A gate that exists for one test."""
    gate = register_gate(Gate("sceptical", "less for a confident teacher", entropy=-1.0))
    yield gate
    del GATES[gate.name]


def user_numbers(name: str) -> dict[str, float]:
    gate = find_gate(name)
    given = {"gate_entropy": 0.7, "gate_label": 0.4}
    return {key: given[key] for key in given if getattr(gate, key.removeprefix("gate_")) is None}


def weights_of(models, name, **options):
    student, *teachers = models
    options = {"target": TARGET, **user_numbers(name), **options}
    _, details = dual_teacher_kl(student, *teachers, gate=name, return_details=True, **options)
    return details.weights


@pytest.mark.parametrize("name", [n for n in gate_names() if find_gate(n).weights is None])
@pytest.mark.parametrize("gate_temperature", [1.0, 0.5])
def test_a_row_wise_gate_is_the_softmax_of_its_score(models, name, gate_temperature):
    t, (a, b) = 2.0, find_gate(name).numbers(**user_numbers(name))
    log_p = torch.stack([F.log_softmax(m.materialize() / t, dim=1) for m in models[1:]], dim=1)
    entropy = -(log_p.exp() * log_p).sum(dim=2)
    label = torch.stack([log_p[i, :, TARGET[i]] for i in range(N)])
    want = torch.softmax((-a * entropy + b * label) / gate_temperature, dim=1)
    got = weights_of(models, name, temperature=t, gate_temperature=gate_temperature)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", gate_names())
def test_weights_sum_to_one_and_have_no_gradient(models, name):
    student, *teachers = models
    x = student.features.clone().requires_grad_()
    loss, details = dual_teacher_kl(
        Similarity(x, student.prototypes, student.scale),
        *teachers,
        gate=name,
        target=TARGET,
        return_details=True,
        **user_numbers(name),
    )
    torch.testing.assert_close(details.weights.sum(dim=1), torch.ones(N, dtype=torch.float64))
    assert not details.weights.requires_grad
    (got,) = torch.autograd.grad(loss, x)
    given = Similarity(x, student.prototypes, student.scale)
    fixed = teacher_kl(given, teachers, temperature=2.0, weights=details.weights)
    (want,) = torch.autograd.grad(fixed, x)
    torch.testing.assert_close(got, want)


def test_the_discrepancy_gate_is_that_of_the_formula(models):
    # Discrepancies from 0 to 0.5, around the threshold of 0.2.
    student, first, second = models
    gaps = torch.linspace(0, 0.5, N, dtype=torch.float64)
    moved = first.features + gaps[:, None] * second.features
    near = Similarity(moved, second.prototypes, second.scale)
    previous = torch.sigmoid(6 * (gaps - 0.2))
    got = weights_of([student, first, near], "discrepancy", temperature=2.0)
    torch.testing.assert_close(got, torch.stack([1 - previous, previous], dim=1))


def test_the_loss_gate_is_that_of_the_formula(models):
    losses = [
        F.cross_entropy(teacher.materialize(), TARGET, reduction="none") for teacher in models[1:]
    ]
    first = (1 + (losses[1] - losses[0]) / (losses[0] + losses[1] + 1e-8)) / 2
    for temperature in (1.0, 2.0):  # the losses are those of the models, not of the divergence
        got = weights_of(models, "loss", temperature=temperature)
        torch.testing.assert_close(got, torch.stack([first, 1 - first], dim=1))


def test_the_loss_gate_looks_at_classes_that_take_part_alone(models):
    mask = torch.tensor([True, True, True, True, True])
    masked = torch.tensor([True, True, True, True, False])
    target = TARGET.clamp(max=3)
    all_classes = weights_of(models, "loss", target=target, class_mask=mask)
    some = weights_of(models, "loss", target=target, class_mask=masked)
    torch.testing.assert_close(all_classes, weights_of(models, "loss", target=target))
    fewer = [Similarity(m.features, m.prototypes[:4], m.scale) for m in models]
    torch.testing.assert_close(some, weights_of(fewer, "loss", target=target))


@pytest.mark.parametrize("name", ["discrepancy", "loss"])
def test_gates_of_two_teachers_refuse_three(models, name):
    student, first, second = models
    with pytest.raises(ValueError, match="^teachers: got "):
        teacher_kl(student, [first, second, first], gate=name, target=TARGET)


@pytest.mark.parametrize(
    ("gate", "options", "error", "message"),
    [
        ("blend", {}, TypeError, "^gate_entropy: got NoneType"),
        ("blend", {"gate_entropy": 1.0}, TypeError, "^gate_label: got NoneType"),
        ("blend", {"gate_entropy": True, "gate_label": 1.0}, TypeError, "^gate_entropy: got bool"),
        ("blend", {"gate_entropy": 1, "gate_label": "1"}, TypeError, "^gate_label: got str"),
        ("blend", {"gate_entropy": math.nan, "gate_label": 1}, ValueError, "^gate_entropy: got"),
        ("label", {"gate_label": 2.0}, ValueError, '^gate_label: got 2.0 with gate="label"'),
        ("loss", {"gate_entropy": 0.0}, ValueError, '^gate_entropy: got 0.0 with gate="loss"'),
        ("loss", {"target": None}, ValueError, "^target: got None"),
        ("blend", {"gate_entropy": 1, "gate_label": 1, "target": None}, ValueError, "^target: "),
        ("oracle", {}, ValueError, "^gate: got 'oracle'"),
    ],
)
def test_what_does_not_fit_is_refused_everywhere(models, gate, options, error, message):
    student, *teachers = models
    with pytest.raises(error, match=message):
        teacher_kl(student, teachers, gate=gate, **{"target": TARGET, **options})
    if "target" not in options:
        for module in (MulKILoss, DualTeacherClipLoss):
            with pytest.raises(error, match=message):
                module(gate=gate, **options)


def test_a_blend_without_the_label_needs_no_target(models):
    student, *teachers = models
    got, want = (
        teacher_kl(student, teachers, gate=gate, **options)
        for gate, options in (
            ("blend", {"gate_entropy": 1.0, "gate_label": 0.0}),
            ("confidence", {}),
        )
    )
    torch.testing.assert_close(got, want)


def test_one_entry_adds_a_gate(models, extra_gate):
    assert extra_gate.name in gate_names()
    confident, sceptical = (weights_of(models, name) for name in ("confidence", "sceptical"))
    torch.testing.assert_close(sceptical, confident.flip(1))
    MulKILoss(gate="sceptical")
    DualTeacherClipLoss(gate="sceptical")
    with pytest.raises(ValueError, match="'sceptical' is registered already"):
        register_gate(Gate("sceptical", "again"))


def test_a_gate_may_be_a_function_of_the_teachers(models):
    def first_alone(teachers, target, class_mask):
        return torch.tensor([1.0, 0.0], dtype=torch.float64).expand(len(target), 2)

    register_gate(Gate("first", "the first", weights=first_alone, needs_target=True))
    try:
        student, *teachers = models
        got = teacher_kl(student, teachers, gate="first", target=TARGET)
        torch.testing.assert_close(got, teacher_kl(student, teachers[:1]))
    finally:
        del GATES["first"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": " "}, ValueError, "^name: got ' '"),
        ({"entropy": math.nan}, ValueError, "^entropy: got nan"),
        ({"label": "1"}, TypeError, "^label: got str"),
        ({"label": 1.0, "weights": gates.loss_weights}, ValueError, "^weights: "),
    ],
)
def test_gates_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        Gate(**{"name": "odd", "summary": "", **arguments})


@pytest.mark.parametrize("gate", ["discrepancy", "loss"])
def test_arguments_are_checked_before_a_function_computes_with_them(models, gate):
    student, first, second = models
    fewer = Similarity(second.features[:4], second.prototypes, 5.0)
    others = Similarity(second.features, second.prototypes[:2], 5.0)
    for teacher, shape in ((fewer, r"\[4, 5\]"), (others, r"\[6, 2\]")):
        with pytest.raises(ValueError, match=rf"^teachers\[1\]: got shape {shape}"):
            teacher_kl(student, [first, teacher], gate=gate, target=TARGET)
    meta = Similarity(second.features.to("meta"), second.prototypes.to("meta"), 5.0)
    with pytest.raises(ValueError, match=r"^teachers\[1\]: got device meta"):
        teacher_kl(student, [first, meta], gate=gate, target=TARGET)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda t, y, m: None, TypeError, "got NoneType"),
        (lambda t, y, m: torch.ones(N, 2).long(), TypeError, "got torch.int64"),
        (lambda t, y, m: torch.ones(N), ValueError, r"got shape \[6\]"),
    ],
)
def test_what_a_function_returns_is_checked(models, extra_gate, function, error, message):
    GATES["sceptical"] = Gate("sceptical", "", weights=function)
    with pytest.raises(error, match=f'^weights of gate "sceptical": {message}'):
        weights_of(models, "sceptical")


def test_what_a_function_returns_is_a_constant(models, extra_gate):
    leaf = torch.full((N, 2), 0.5, requires_grad=True)
    GATES["sceptical"] = Gate("sceptical", "", weights=lambda t, y, m: leaf)
    student, *teachers = models
    x = student.features.clone().requires_grad_()
    loss = teacher_kl(Similarity(x, student.prototypes), teachers, gate="sceptical")
    loss.backward()
    assert leaf.grad is None and x.grad is not None


def test_numbers_of_a_gate_beside_weights(models):
    student, *teachers = models
    given = torch.full((N, 2), 0.5, dtype=torch.float64)
    with pytest.raises(ValueError, match="^gate_entropy: got 1.0"):
        teacher_kl(student, teachers, weights=given, gate_entropy=1.0)
    numbers = {"gate_entropy": 1.0, "gate_label": 1.0}
    got = dual_teacher_kl(student, *teachers, weights=given, gate="blend", **numbers)
    assert got == dual_teacher_kl(student, *teachers, weights=given)


def test_a_number_that_changes_compiles(models):
    student, *teachers = (Similarity(m.features.float(), m.prototypes.float(), 9.0) for m in models)

    def loss(x, a):
        given = Similarity(x, student.prototypes, 9.0)
        options = {"gate": "blend", "gate_entropy": a, "gate_label": 1.0, "target": TARGET}
        return teacher_kl(given, teachers, **options)

    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    for a in (1.0, 2.0, -0.5):
        torch.testing.assert_close(compiled(student.features, a), loss(student.features, a))
