from __future__ import annotations

import pytest

from mulki.errors import InputError
from mulki.train.config.rates import learning_rates


def test_rates_by_task() -> None:
    assert learning_rates(["mnist=5e-5", "a=b=1"]) == {"mnist": 5e-5, "a=b": 1.0}
    assert learning_rates([]) == {}


@pytest.mark.parametrize(
    "entry", ["mnist", "mnist=", "=1", "a=fast", "a=0", "a=-1", "a=nan", "a=inf"]
)
def test_other_forms_are_refused(entry: str) -> None:
    with pytest.raises(InputError, match=f"^--lr-of: got '{entry}'"):
        learning_rates(["a=1", entry])
