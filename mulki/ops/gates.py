"""Gates: how much each of K teachers counts for each of N samples.

A row-wise gate is two numbers, a and b. Its weights are

    w_ik = softmax over k of (-a H(p_ik) + b log p_ik[target_i]) / gate_temperature

where p_ik is the class distribution of teacher k for sample i, at the temperature of the loss, and
H its entropy in nats. The operators compute these weights in the same pass as the KL divergence.
Any other gate is a function that computes the weights [N, K] before that pass. Weights are
constants for autograd.

One call of `register_gate` adds a gate to the functions, the modules and the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mulki.ops import checks

# A teacher as an operator takes it: features [N, D], prototypes [P, D], scale (0-d).
Teacher = tuple[Tensor, Tensor, Tensor]
# From K teachers, the target [N] and the class mask [P] to weights [N, K], rows sum to 1.
WeightsFunction = Callable[[Sequence[Teacher], Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class Gate:
    """One gate.

    Args:
        name: what users call it.
        summary: its formula or idea in a few words, for help texts.
        entropy: a of the row-wise score; None where the user gives it (`gate_entropy`).
        label: b of the row-wise score; None where the user gives it (`gate_label`).
        weights: computes the weights instead of the row-wise score.
        needs_target: whether `weights` looks at the target; a row-wise gate does where b is not 0.

    Raises:
        TypeError, ValueError: an empty name, a number that is not finite, or both kinds of rule.
    """

    name: str
    summary: str
    entropy: float | None = 0.0
    label: float | None = 0.0
    weights: WeightsFunction | None = None
    needs_target: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise ValueError(f"name: got {self.name!r}, wanted the name of a gate")
        for field in ("entropy", "label"):
            value = getattr(self, field)
            if value is not None:
                checks.finite_number(field, value)
        if self.weights is not None and (self.entropy != 0 or self.label != 0):
            raise ValueError(
                f"weights: got a function together with entropy {self.entropy} and label "
                f"{self.label}, wanted one of the two rules; leave the others out"
            )

    def numbers(
        self, gate_entropy: float | None = None, gate_label: float | None = None
    ) -> tuple[float, float]:
        """a and b, from the table or, where the gate leaves them to the user, from the arguments.

        Raises:
            TypeError, ValueError: an argument is missing, not finite, or not this gate's.
        """
        a = _number("gate_entropy", gate_entropy, self.entropy, self.name)
        return a, _number("gate_label", gate_label, self.label, self.name)


def _number(argument: str, given: float | None, fixed: float | None, gate: str) -> float:
    if fixed is None:
        checks.finite_number(argument, given, f' for gate="{gate}"; pass it')
        assert given is not None
        return float(given)
    if given is not None:
        raise ValueError(
            f'{argument}: got {given} with gate="{gate}", which does not take it; leave it out or '
            f'use gate="blend"'
        )
    return fixed


GATES: dict[str, Gate] = {}


def register_gate(gate: Gate) -> Gate:
    """Add a gate, so that users can name it.

    Raises:
        TypeError, ValueError: it is no `Gate`, or the name is taken.
    """
    if not isinstance(gate, Gate):
        raise TypeError(f"gate: got {type(gate).__name__}, wanted a mulki.ops.gates.Gate")
    if gate.name in GATES:
        raise ValueError(f"gate: {gate.name!r} is registered already; choose another name")
    GATES[gate.name] = gate
    return gate


def find_gate(name: str) -> Gate:
    """The gate of that name.

    Raises:
        ValueError: there is none.
    """
    checks.choice("gate", name, tuple(GATES))
    return GATES[name]


def gate_names() -> tuple[str, ...]:
    """The names of all gates, in the order in which they were registered."""
    return tuple(GATES)


class Weighting(NamedTuple):
    """A gate, found by its name, with the numbers of its user."""

    gate: Gate
    temperature: float = 1.0
    entropy: float = 0.0  # a of a row-wise gate
    label: float = 0.0  # b

    @classmethod
    def of(
        cls,
        gate: str,
        temperature: float = 1.0,
        entropy: float | None = None,
        label: float | None = None,
    ) -> Weighting:
        """The gate of that name; errors name `gate_temperature` and so on.

        Raises:
            TypeError, ValueError: there is none, or a number is missing, out of range or not its.
        """
        plain = type(gate) is str and type(temperature) is float and entropy is label is None
        known = _weightings.get((gate, temperature)) if plain else None
        if known is not None and known.gate is GATES.get(gate):
            return known
        found = find_gate(gate)
        checks.temperature("gate_temperature", temperature)
        weighting = cls(found, float(temperature), *found.numbers(entropy, label))
        if plain and not torch.compiler.is_compiling():
            _weightings[gate, temperature] = weighting
        return weighting

    @property
    def numbers(self) -> tuple[float, float, float]:
        """As the operators take them."""
        return self[1:]

    @property
    def arguments(self) -> dict[str, str | float | None]:
        """As the losses take them."""
        return {
            "gate": self.gate.name,
            "gate_temperature": self.temperature,
            "gate_entropy": self.entropy if self.gate.entropy is None else None,
            "gate_label": self.label if self.gate.label is None else None,
        }

    @property
    def has_temperature(self) -> bool:
        """Whether the temperature has a say: the gate has a score, and not the same for all."""
        return self.entropy != 0 or self.label != 0

    @property
    def uses_target(self) -> bool:
        """Whether the gate looks at the target."""
        return self.gate.needs_target or self.label != 0


#: Of gates and temperatures without other numbers: a loss asks for the same one at every step.
_weightings: dict[tuple[str, float], Weighting] = {}


def weights_of(
    gate: Any,  # with the numbers of a row-wise gate, as the arguments of an operator have
    entropy: Tensor | None,  # [N, K] of the teachers, where a is not 0
    at_target: Tensor | None,  # [N, K], their log-probability of the target, where b is not 0
    like: Tensor,  # [N, K]
) -> Tensor:  # [N, K], rows sum to 1
    """The weights of a row-wise gate: the specification of what the operators compute."""
    scores, t = [], gate.gate_temperature
    for value, factor in ((entropy, -gate.gate_entropy), (at_target, gate.gate_label)):
        if factor:
            assert value is not None
            scores.append(value if factor == t else value * (factor / t))
    if not scores:
        return torch.full_like(like, 1 / like.shape[1])
    return torch.softmax(sum(scores[1:], scores[0]), dim=1)


def discrepancy(
    original: Tensor,  # [N, D]
    previous: Tensor,  # [N, D]
) -> Tensor:  # [N]
    """sigmoid(6 (|u_1 - u_2| - 0.2)) on the features u of the original and the previous model.

    Select-and-Distill (Yu et al., ECCV 2024): the weight of the previous model.
    """
    dtype = torch.float64 if original.dtype == torch.float64 else torch.float32
    return torch.sigmoid(6 * ((original.to(dtype) - previous.to(dtype)).norm(dim=1) - 0.2))


def discrepancy_weights(
    teachers: Sequence[Teacher], target: Tensor | None = None, class_mask: Tensor | None = None
) -> Tensor:  # [N, 2]
    """w_2 = `discrepancy` of the features of two teachers of one width.

    The gate of Select-and-Distill (Yu et al., ECCV 2024), teachers in the order (original,
    previous): features that have moved far are those of a task that the previous model has learned.

    Raises:
        ValueError: the teachers are not two of one width.
    """
    shapes = [list(features.shape) for features, _, _ in teachers]
    if len(teachers) != 2 or shapes[0] != shapes[1]:
        raise ValueError(
            f"teachers: got features of shapes {shapes}, wanted two of one width for gate="
            f'"discrepancy"; use another gate'
        )
    (original, _, _), (previous, _, _) = teachers
    w = discrepancy(original, previous)
    return torch.stack([1 - w, w], dim=1)


# An `ignore_index` that no target has.
_IGNORE_NONE = -(2**63)


def loss_weights(
    teachers: Sequence[Teacher], target: Tensor | None, class_mask: Tensor | None = None
) -> Tensor:  # [N, 2]
    """w_1 = (1 + (l_2 - l_1) / (l_1 + l_2 + eps)) / 2, l_k the loss of teacher k.

    The linear gate in the code of LfI (CVPR 2026), where the losses are the cross-entropies of the
    two models that distil into each other; its paper has a sigmoid of three times the ratio. Here
    l_k is the cross-entropy of teacher k's logits with the target, at temperature 1. It costs one
    more product of features and prototypes per teacher.

    Raises:
        ValueError: there are not two teachers.
    """
    if len(teachers) != 2:
        raise ValueError(
            f'teachers: got {len(teachers)}, wanted two for gate="loss"; use another gate'
        )
    first, second = (
        torch.ops.mulki.prototype_cross_entropy(
            *(*teacher, target, class_mask, 0.0, _IGNORE_NONE), None, "none", [False] * 3
        )[0]
        for teacher in teachers
    )
    w = (1 + (second - first) / (first + second + 1e-8)) / 2
    return torch.stack([w, 1 - w], dim=1)


register_gate(Gate("uniform", "1/K for each teacher"))
register_gate(Gate("confidence", "more for a teacher with a low entropy", entropy=1.0))
register_gate(Gate("label", "more for a teacher that finds the label likely", label=1.0))
register_gate(Gate("blend", "both, by --gate-entropy and --gate-label", entropy=None, label=None))
register_gate(
    Gate(
        "discrepancy",
        "more for the previous model where the teachers' features differ",
        weights=discrepancy_weights,
    )
)
register_gate(
    Gate(
        "loss",
        "more for the teacher with the smaller cross-entropy, normalised",
        weights=loss_weights,
        needs_target=True,
    )
)
