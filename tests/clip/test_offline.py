from __future__ import annotations

import pytest

from mulki.clip.offline import offline


def test_the_hub_is_reached_again_afterwards() -> None:
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    with pytest.raises(ZeroDivisionError), offline():
        assert constants.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert before == constants.HF_HUB_OFFLINE
