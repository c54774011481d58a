"""What a run needs and has not: data sets, a reference set, weights; all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mulki import methods
from mulki.clip.models import BUNDLED, RANDOM
from mulki.data import Source
from mulki.data.published.collections import COLLECTIONS
from mulki.errors import InputError
from mulki.train.config.run_config import CURRENT, MADE, RunConfig, Settings
from mulki.train.config.tasks import load_tasks
from mulki.train.start.data import check_reference


def missing(settings: Settings) -> list[str]:
    """One line for each thing that a run needs and that is not there, with what to do about it."""
    config = settings.run
    found = [*_missing_data(config), *_missing_weights(config.model, config.pretrained)]
    found += _problems(lambda: check_reference(config, methods.get(config.method)(settings.method)))
    given = config.reference or CURRENT
    if given not in (CURRENT, MADE) and "{" not in given and not Path(given).exists():
        found.append(f"--reference: {given} does not exist; pass a folder, CSV or shards")
    return found


def _missing_data(config: RunConfig) -> list[str]:
    collection = COLLECTIONS.get(config.tasks[0]) if len(config.tasks) == 1 else None
    if collection is None or config.data_root is None:
        return _problems(lambda: load_tasks(config))
    source = Source(config.data_root, config.protocol)
    if not Path(config.data_root).expanduser().is_dir():
        return _problems(source.folder)
    return [
        problem
        for name in collection.in_order(config.order)
        for problem in _problems(partial(collection.task, name, source))
    ]


def _problems(load: Callable[[], object]) -> list[str]:
    try:
        load()
    except InputError as error:
        return [str(error)]
    return []


def _missing_weights(model: str, pretrained: str | None) -> list[str]:
    if model == BUNDLED or pretrained in (None, RANDOM) or Path(pretrained).is_file():
        return []
    import open_clip

    known = open_clip.get_pretrained_cfg(model.replace("/", "-"), pretrained)
    if not known:
        return []  # a name that the run refuses, with those that there are
    try:
        open_clip.download_pretrained(known)
    except Exception as error:  # whatever a network and a hub raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        home = known.get("hf_hub") or known.get("url")
        return [
            f"--model {model} --pretrained {pretrained}: not on this machine, and cannot be "
            f"downloaded ({reason}); fetch {home} where there is a network, and pass the file "
            "as --pretrained FILE"
        ]
    return []
