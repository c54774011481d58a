"""Operators at random shapes, dtypes, options and strides, against the reference in float64.

A few and always the same in an everyday run; `make nightly` draws many new ones.
"""

from __future__ import annotations

from typing import Any

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from mulki.bench.cases import DTYPES, OPERATORS, PAIRED, Case
from tests.ops.conftest import Backend
from tests.ops.oracle import REDUCTIONS, check
from tests.ops.test_conformance import LAYOUTS, laid_out

temperatures = st.floats(0.25, 8, width=32)


@st.composite
def options_of(draw: st.DrawFn, operator: str) -> dict[str, Any]:
    """Options that an operator takes."""
    if operator == "similarity":
        return {"normalize": draw(st.booleans())}
    if operator == "prototype_cross_entropy":
        found: dict[str, Any] = {"label_smoothing": draw(st.floats(0, 1, width=32))}
        found |= draw(st.sampled_from([{}, {"ignore_index": -100}, {"ignore_index": 2}]))
        return found | ({"class_mask": True} if draw(st.booleans()) else {})
    if operator == "siglip":
        return {"offset": draw(st.integers(-50, 80))} if draw(st.booleans()) else {}
    if not OPERATORS[operator].teachers:
        return {}
    found = {"temperature": draw(temperatures), "scale_by_t2": draw(st.booleans())}
    numbers = st.floats(-1.5, 1.5, width=32)
    if draw(st.booleans()) and operator != "dual_teacher_kl":
        found["weights"] = True
    else:
        found["gate"] = gate = draw(st.sampled_from(["uniform", "confidence", "label", "blend"]))
        found["gate_temperature"] = draw(temperatures)
        if gate == "blend":
            found |= {"gate_entropy": draw(numbers), "gate_label": draw(numbers)}
    if operator != "pair_kl" and draw(st.booleans()):
        found["class_mask"] = True
    return found


@st.composite
def cases(draw: st.DrawFn) -> Case:
    operator = draw(st.sampled_from(sorted(OPERATORS)))
    options = draw(options_of(operator))
    n, p, d = (draw(st.integers(1, most)) for most in (40, 70, 70))
    if operator in PAIRED and "offset" not in options:
        p = n
    return Case(
        operator,
        n,
        p,
        d,
        draw(st.sampled_from(sorted(DTYPES))),
        options=tuple(options.items()),
        scale=draw(st.floats(-100, 100, width=32)),
        gap=draw(st.sampled_from([None, 0.01, 0.3])),
        seed=draw(st.integers(0, 5)),
    )


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    case=cases(),
    layout=st.sampled_from(["", *LAYOUTS]),
    reduction=st.sampled_from(REDUCTIONS),
)
def test_any_shape_dtype_option_and_layout(
    case: Case, layout: str, reduction: str, backend: Backend
) -> None:
    note(f"{case}, {layout}, {reduction}")
    inputs = case.inputs()
    if layout:
        inputs = laid_out(inputs, layout)
    inputs = inputs.map(lambda t: t.to(backend.device))
    check(case.operator, inputs, reduction, backend.cuts, few=True)
