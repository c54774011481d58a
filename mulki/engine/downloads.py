"""What a run would download before its first step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mulki.errors import InputError
from mulki.models import BUNDLED
from mulki.offline import offline


def weights_to_download(model: str, pretrained: str | None) -> str:
    """Where the weights of a start model would be downloaded from.

    Args:
        model, pretrained: the options of a run.

    Returns:
        The address; empty where they are on this machine, or are not of a known tag.

    Raises:
        InputError: a model of a hub whose configuration is not on this machine, so that nothing
            can be said of it.
    """
    import open_clip
    from open_clip.pretrained import download_pretrained_from_hf

    with offline():
        schema, _, place = model.partition(":")
        if schema == "hf-hub":
            try:
                download_pretrained_from_hf(place, filename="open_clip_config.json")
                download_pretrained_from_hf(place)
            except Exception as error:  # whatever a hub raises without a network
                raise InputError(
                    f"--model {model}: not on this machine, and only the hub knows what it is; "
                    "download it first, for nothing is downloaded for a plan"
                ) from error
        if model == BUNDLED or pretrained is None or Path(pretrained).is_file():
            return ""
        known = open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained)
        return "" if not known or _is_here(known) else str(known.get("hf_hub") or known["url"])


def _is_here(known: dict[str, Any]) -> bool:
    import open_clip

    if not known.get("hf_hub"):
        # As open_clip looks for it, which would go on with the download.
        return (Path.home() / ".cache" / "clip" / Path(known["url"]).name).is_file()
    try:
        open_clip.download_pretrained(known)
    except Exception:  # whatever a hub raises without a network
        return False
    return True
