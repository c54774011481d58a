"""What the tests of losses, stages and methods share."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.clip.features import Features
from mulki.ops import backends
from mulki.runs import environment

with contextlib.suppress(ImportError):  # a machine that is lent for GPU tests may not have it
    from hypothesis import settings

    # In an everyday run few cases, and always the same; `make nightly` draws many and new ones, by
    # --hypothesis-profile=nightly.
    settings.register_profile("everyday", derandomize=True, max_examples=25, database=None)
    settings.register_profile("nightly", max_examples=2000, print_blob=True)
    settings.load_profile("everyday")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--long", action="store_true", help="run what is marked long, and nothing else"
    )


def pytest_configure(config: pytest.Config) -> None:
    # Processes of pytest-xdist, and those that their tests start, share the cores. Or else
    # threads of OpenMP, which spin while they wait for others, would take most of the time.
    processes = getattr(config.option, "numprocesses", None)
    if processes:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    long = [item for item in items if item.get_closest_marker("long")]
    short = [item for item in items if not item.get_closest_marker("long")]
    # What takes longest goes first, so that the processes of `make test` end together: files with
    # slow tests, and of the long ones the last, of whole runs.
    slow = {item.path for item in short if item.get_closest_marker("slow")}
    short.sort(key=lambda item: item.path not in slow)
    long.sort(key=lambda item: item.path, reverse=True)
    items[:], left_out = (long, short) if config.getoption("--long") else (short, long)
    config.hook.pytest_deselected(items=left_out)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(scope="session", autouse=True)
def real_fsync() -> Iterator[Callable[[int], None]]:
    """Tests do not wait for the disk, a fifth of a short run; this would."""
    real = os.fsync
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield real


@pytest.fixture(scope="session", autouse=True)
def git_asked_once() -> Iterator[None]:
    """A run folder asks git three times for the commit, which is the same in all tests."""
    asked = functools.cache(environment.git_state)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "git_state", asked)
        yield


@pytest.fixture(autouse=True)
def environment_read_anew() -> Iterator[None]:
    """What a test has set chooses no backend in the next one."""
    yield
    backends.read_environment()


@pytest.fixture(scope="module")
def triton_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of Triton's that no earlier run has filled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


@pytest.fixture
def unit() -> Callable[..., Tensor]:
    """Draw [n, d] unit rows in float64: other ones at every call, the same ones in every run."""
    generator = torch.Generator().manual_seed(0)

    def draw(n: int, d: int) -> Tensor:
        return F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=1)

    return draw


@pytest.fixture
def model_features(unit: Callable[..., Tensor]) -> Callable[..., Features]:
    """Draw what one model says of a batch of 6 images and 4 classes."""

    def make(width: int = 5, scale: float = 7.0, grad: bool = False) -> Features:
        tensors = unit(6, width), unit(4, width), unit(4, width)
        images, texts, prototypes = (t.requires_grad_(grad) for t in tensors)
        return Features(images, texts, scale, prototypes)

    return make


@pytest.fixture
def target() -> Tensor:
    """Classes of the 6 images of `model_features`; class 3 has no sample."""
    return torch.tensor([0, 2, 1, 2, 0, 2])


@pytest.fixture
def student(model_features: Callable[..., Features]) -> Features:
    return model_features(grad=True)


@pytest.fixture
def with_anchors(unit: Callable[..., Tensor]) -> Callable[[Features], Features]:
    """Give what a model says two classes of earlier tasks and three words."""

    def add(model: Features) -> Features:
        width = model.images.shape[1]
        return replace(model, anchored=torch.cat([model.texts, unit(5, width)]), num_seen=2)

    return add


@pytest.fixture
def teachers(model_features: Callable[..., Features]) -> tuple[Features, Features]:
    return model_features(scale=9.0), model_features(scale=4.0)
