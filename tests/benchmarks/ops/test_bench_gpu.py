"""What of the operator benchmark is for a GPU, through seams: nothing pretends to be one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mulki.bench import clocks, graphs, largest, measure, point
from mulki.bench.by_rows import in_chunks, outcome
from mulki.bench.cases import GPU_GRID, MATRIX_ENTRIES, MODES, OPERATORS, PAIRED, Case, make_cases
from mulki.bench.losses import EAGER
from mulki.bench.machine import describe_machine
from mulki.bench.pace import Pace
from mulki.bench.point import measure_case
from mulki.bench.providers import GRAPH_LOGITS, PROVIDERS, Provider
from mulki.bench.report import Quantiles, Result, markdown, rows_of
from mulki.bench.run import BenchOptions, run
from mulki.bench.verify import Verifier
from mulki.cli import run_command
from tests import ROOT

CASE = Case("dual_teacher_kl", 7, 5, 16, "float32")
# Large enough that which rounding comes out smaller is no matter of luck.
VERIFIED = Case("dual_teacher_kl", 17, 33, 64, "float32")


# --- large cases: chunks of rows, the grid, the budget


@pytest.mark.parametrize("operator", [name for name in OPERATORS if name != "similarity"])
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_chunks_of_rows_add_up_to_the_whole(operator: str, rows: int) -> None:
    case = Case(operator, 11, 11 if operator in PAIRED else 6, 8, "float32")
    inputs = case.inputs(exact=True)
    whole = outcome(EAGER[operator], inputs)
    chunks = in_chunks(case, inputs, most=rows * case.p)
    assert chunks.keys() == whole.keys()
    for name, value in whole.items():
        torch.testing.assert_close(chunks[name], value, rtol=1e-12, atol=1e-13)


def test_a_large_case_is_verified_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the last row alone is noticed, though no chunk holds more than two rows."""
    case = Case("siglip", 7, 7, 16, "float32")
    monkeypatch.setattr("mulki.bench.by_rows.in_chunks.__defaults__", (2 * case.p,))
    inputs = case.inputs()
    verifier = Verifier(case, inputs)
    right = EAGER[case.operator]
    assert not verifier.problems(verifier.errors(outcome(right, inputs)))

    def last_row_is_off(x: Tensor, *others: Any) -> Tensor:
        off = 0.01 * (x[-1:] - x[-1:].detach())
        return right(torch.cat([x[:-1], x[-1:] + off]), *others)

    problems = verifier.problems(verifier.errors(outcome(last_row_is_off, inputs)))
    assert [p.partition(":")[0] for p in problems] == ["gradient of features"]


def test_the_grid_of_a_gpu_has_what_is_asked_for() -> None:
    made = make_cases(list(OPERATORS), None, ["bfloat16"], "cuda", by_shape=True)
    of = {name: [c for c in made if c.operator == name] for name in OPERATORS}
    assert {(c.n, c.p, c.d) for c in of["dual_teacher_kl"]} == set(GPU_GRID)
    assert all(c.n == c.p for name in PAIRED for c in of[name])
    assert max(c.n * c.p for c in of["similarity"]) <= MATRIX_ENTRIES
    # By shape: the first shapes of all operators, then the second ones.
    first = [(c.operator, c.shape) for c in made[: len(OPERATORS)]]
    assert [name for name, _ in first] == list(OPERATORS)
    assert dict(first)["dual_teacher_kl"] == "64x100x512"


def test_what_does_not_fit_the_budget_is_left_out_last_first() -> None:
    clock = [100.0]
    pace: Pace[str] = Pace(10.0, now=lambda: clock[0])
    clock[0] += 1  # of preparations, which the budget pays for
    taken = []
    for item in pace.take("abcdefg"):
        taken.append(item)
        clock[0] += 2.5
    # The fourth would end at 11 of 10 seconds.
    assert taken == ["a", "b", "c"] and pace.left_out == ["d", "e", "f", "g"]
    forever: Pace[str] = Pace(0.0, now=lambda: clock[0])
    assert list(forever.take("ab")) == ["a", "b"] and not forever.left_out


def test_a_run_says_which_points_it_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = measure.ProductRates(torch_mm=1e9, similarity=1e9)
    monkeypatch.setattr(measure, "product_rate", lambda dtype, device: rates)
    monkeypatch.setattr(measure, "copy_rate", lambda device: 1e9)
    said: list[str] = []
    options = BenchOptions(
        ops=("siglip", "similarity"),
        shapes=("3x3x4", "2x2x4"),
        dtypes=("fp32",),
        modes=("forward",),
        providers=("eager",),
        seconds=0.001,
        budget=1e-9,
    )
    assert run(options, said.append) == 0
    # One at least, and the rest shape by shape.
    assert any(line.startswith("\nsiglip, 3x3x4") for line in said)
    assert said[-1] == (
        "left out: 3 points, beyond --budget 1e-09: "
        "similarity 3x3x4 float32; siglip 2x2x4 float32; similarity 2x2x4 float32"
    )


# --- time


class Log:
    """Stands for torch.cuda, and notes what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def note(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "get_device_properties":
                return SimpleNamespace(L2_cache_size=1 << 20)
            return name

        return note

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802 - torch's name
        assert enable_timing
        number = sum(call.startswith("record") for call in self.calls)
        return SimpleNamespace(
            record=lambda stream: self.calls.append(f"record on {stream}"),
            synchronize=lambda: self.calls.append("wait"),
            elapsed_time=lambda stop: 8.0 * (stop.number - number),
            number=number,
        )

    @contextmanager
    def device(self, device: object) -> Iterator[None]:
        yield


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(torch, "cuda", log)
    made = torch.empty

    def empty(size: int, **options: Any) -> Tensor:
        flush = made(1)
        log.calls.append(f"empty {size}")
        return flush

    monkeypatch.setattr(torch, "empty", empty)
    return log


def test_events_time_a_call_from_an_idle_device(cuda: Log) -> None:
    clock = clocks.EventClock("cuda")
    assert cuda.calls == ["get_device_properties", f"empty {2 << 20}"]
    cuda.calls.clear()
    clock.ready(ahead=False)
    start = clock.mark()
    stop = clock.mark()
    assert clock.seconds(start, stop) == 0.008
    on_stream = ["current_stream", "record on current_stream"]
    assert cuda.calls == ["synchronize", *on_stream, *on_stream, "wait"]


def test_the_device_alone_is_timed_while_the_host_is_ahead(cuda: Log) -> None:
    clock = clocks.EventClock("cuda")
    cuda.calls.clear()
    clock.ready(ahead=True)
    assert cuda.calls == ["_sleep"]


def test_the_clock_is_made_ready_right_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Clock:
        def ready(self, ahead: bool) -> None:
            order.append("ahead" if ahead else "ready")

        def mark(self) -> int:
            order.append("mark")
            return len(order)

        def seconds(self, start: int, stop: int) -> float:
            return float(stop - start)

    monkeypatch.setattr(clocks, "clock_of", lambda device: Clock())
    inputs = Case("similarity", 3, 3, 4, "float32").inputs()

    def loss(*arguments: Tensor) -> Tensor:
        order.append("call")
        return EAGER["similarity"](*arguments)

    found = {}
    for mode in MODES:
        order.clear()
        measure.timed(mode, loss, inputs, "cuda", ahead=mode == "both")
        found[mode] = order.copy()
    assert found["forward"] == ["ready", "mark", "call", "mark"]
    assert found["backward"] == ["call", "ready", "mark", "mark"]
    assert found["both"] == ["ahead", "mark", "call", "mark"]
    order.clear()
    assert measure.timed_call(lambda: order.append("replay"), "cuda") == 2.0
    assert order == ["ready", "mark", "replay", "mark"]


def test_a_gpu_has_a_time_of_its_own_in_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def timed(mode: str, loss: Any, inputs: Any, device: str, ahead: bool) -> float:
        asked.append(ahead)
        return 0.001 if ahead else 0.002

    monkeypatch.setattr(measure, "timed", timed)
    monkeypatch.setattr(clocks, "has_events", lambda device: True)
    (result,) = measure_case(CASE, ("eager",), ("both",), seconds=1e-9)
    assert result.metrics["speed"].median == 2.0 and result.metrics["device_time"].median == 1.0
    assert set(asked) == {True, False}


def test_a_copy_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(clocks, "now", lambda device: float(next(ticks)))
    assert measure.copy_rate("cpu") == 2 * (1 << 28)


# --- graphs


class FakeGraph:
    """What `graphs.capture` makes, without a GPU: a replay calls again."""

    def __init__(self, call: Callable[[], tuple[Tensor, ...]]) -> None:
        self.call, self.count = call, 0
        self.outputs = call()

    def replay(self) -> None:
        self.count += 1
        for old, new in zip(self.outputs, self.call(), strict=True):
            old.data.copy_(new)


def test_a_graph_is_verified_and_timed_by_its_replays(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[FakeGraph] = []

    def capture(call: Callable[[], tuple[Tensor, ...]], device: str) -> graphs.Replay:
        made.append(FakeGraph(call))
        return graphs.Replay(made[-1].replay, made[-1].outputs)

    monkeypatch.setattr(graphs, "capture", capture)
    results = measure_case(VERIFIED, ("eager", "graph", "mulki-graph"), MODES, seconds=1e-9)
    by = {(r.provider, r.mode): r for r in results}
    for name in ("graph", "mulki-graph"):
        assert by[name, "backward"].status == "not applicable"
        for mode in ("forward", "both"):
            found = by[name, mode]
            assert found.status == "timed", found.notes
            assert "speedup_over_eager" in found.metrics and "memory" not in found.metrics
    assert "speedup_over_graph" in by["eager", "both"].metrics
    assert len(made) == 4 and all(graph.count > 5 for graph in made)


def test_a_graph_that_replays_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(call: Callable[[], tuple[Tensor, ...]], device: str) -> graphs.Replay:
        outputs = tuple(t.clone() for t in call())
        return graphs.Replay(lambda: outputs[-1].zero_(), outputs)

    monkeypatch.setattr(graphs, "capture", capture)
    (result,) = measure_case(CASE, ("graph",), ("both",), seconds=1e-9)
    assert result.status == "failed" and "gradient of scale" in str(result.notes)


def test_the_order_of_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    @contextmanager
    def noted(name: str) -> Iterator[None]:
        order.append(f"enter {name}")
        yield
        order.append(f"leave {name}")

    def stream(name: str) -> Any:
        return SimpleNamespace(
            name=name, wait_stream=lambda other: order.append(f"{name} waits for {other.name}")
        )

    current = stream("current")
    graph = SimpleNamespace(replay=lambda: order.append("replay"))
    fake = SimpleNamespace(
        device=lambda device: noted(device),
        current_stream=lambda: current,
        Stream=lambda: stream("side"),
        stream=lambda side: noted(side.name),
        CUDAGraph=lambda: graph,
        graph=lambda one: noted("graph"),
    )
    monkeypatch.setattr(torch, "cuda", fake)

    def call() -> tuple[Tensor, ...]:
        order.append("call")
        return (torch.ones(1),)

    made = graphs.capture(call, "cuda:1")
    made.replay()
    assert order == [
        *("enter cuda:1", "side waits for current", "enter side", "call", "call", "call"),
        *("leave side", "current waits for side", "enter graph", "call", "leave graph"),
        *("leave cuda:1", "replay"),
    ]


def test_large_calls_are_not_captured() -> None:
    side = int(GRAPH_LOGITS**0.5)
    refusal = PROVIDERS["graph"].refusal
    assert refusal(Case("siglip", side, side, 8, "float32")) is None
    assert "at most" in str(refusal(Case("siglip", 2 * side, 2 * side, 8, "float32")))


# --- memory


def starving(beyond: int) -> Provider:
    """A provider whose memory ends at so many rows."""

    def make(case: Case) -> Callable[..., Tensor]:
        def loss(x: Tensor, *others: Any) -> Tensor:
            if x.shape[0] > beyond:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate")
            return EAGER[case.operator](x, *others)

        return loss

    return Provider("mulki", make)


def test_a_lack_of_memory_is_a_result_and_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    freed: list[str] = []
    monkeypatch.setattr(point, "free_memory", freed.append)
    monkeypatch.setitem(PROVIDERS, "mulki", starving(5))
    results = measure_case(CASE, ("eager", "mulki"), ("both",), seconds=1e-9)
    assert [r.status for r in results] == ["timed", "out of memory"] and freed == ["cpu"]
    assert results[1].notes == ("CUDA out of memory. Tried to",)
    rates = measure.ProductRates(torch_mm=1e9, similarity=1e9)
    monkeypatch.setattr(measure, "product_rate", lambda dtype, device: rates)
    monkeypatch.setattr(measure, "copy_rate", lambda device: 1e9)
    given = ("--shapes", "6x6x4", "--ops", "siglip", "--dtypes", "fp32", "--seconds", "1e-9")
    assert run_command(["bench", *given, "--providers", "mulki"]) == 0
    assert "mulki: out of memory: CUDA out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fits", "n", "why"),
    [
        (100, 96, "104 does not fit"),
        (64, 64, "72 does not fit"),
        (15, 0, "does not fit"),
        (4096, 1024, "search ends"),
    ],
)
def test_the_search_doubles_and_halves(fits: int, n: int, why: str) -> None:
    tried: list[int] = []

    def seconds(samples: int) -> float | None:
        tried.append(samples)
        return 0.1 if samples <= fits else None

    found = largest.largest(seconds, 16, 1024)
    assert found.n == n and why in found.why and len(tried) <= 10


def test_the_search_ends_where_a_call_takes_long() -> None:
    found = largest.largest(lambda n: n / 2, 16, 1024)
    assert found == (32, "where a call took 16 s")


def test_the_largest_n_of_a_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(largest, "PROTOTYPES", 4)
    monkeypatch.setattr(largest, "START", 8)
    monkeypatch.setattr(largest, "LIMIT", 64)
    monkeypatch.setitem(PROVIDERS, "mulki", starving(20))
    monkeypatch.setitem(PROVIDERS, "wrong", Provider("wrong", lambda case: 1 / 0))  # type: ignore
    (case,) = largest.cases(["prototype_cross_entropy"], ["float32"], "cpu")
    mulki, eager, graph, wrong, memeff = largest.search(
        case, ["mulki", "eager", "graph", "wrong", "memeff"]
    )
    assert (mulki.status, mulki.case.n, mulki.case.p) == ("searched", 20, 4)
    assert mulki.notes == ("N = 20, and 22 does not fit",)
    assert eager.case.n == 64 and eager.metrics["largest_n"].median == 64
    assert graph.status == memeff.status == "not applicable" and wrong.status == "failed"
    text = markdown([row for r in (mulki, eager) for row in rows_of(r, MACHINE)])
    assert "Largest N" in text and "| mulki | eager |" in text
    assert "| prototype_cross_entropy | N x 4 x 512 | float32 | 20 | 64 |" in text


MACHINE = dict.fromkeys(describe_machine("cpu"), "")


def test_pairs_are_searched_along_the_diagonal() -> None:
    case = Case("siglip", 1024, 1024, 512, "bfloat16")
    assert largest.with_samples(case, 4096).p == 4096


# --- peers

LIGER = """
import torch
import torch.nn.functional as F

def liger_fused_linear_cross_entropy(input, weight, target, bias=None, ce_weight=None,
        ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0, reduction="mean",
        softcap=None, return_z_loss=False, accum_dtype=None, use_token_scaling=False,
        return_token_accuracy=False, return_predicted_tokens=False, chunk_mem_const=1):
    return F.cross_entropy(input @ weight.T, target, reduction=reduction)

def liger_fused_linear_kl_div(student_input, student_weight, target, shift_labels=None,
        reduction="batchmean", ignore_index=-100, temperature=1.0, eps=1e-10, accum_dtype=None):
    assert not target.requires_grad and accum_dtype == torch.float32
    log_q = F.log_softmax(student_input @ student_weight.T / temperature, dim=1)
    return F.kl_div(log_q, target, reduction=reduction)
"""
CCE = """
import torch.nn.functional as F

def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean",
        shift=False, filter_eps="high", impl="cce"):
    assert e.is_contiguous()
    return F.cross_entropy(e.float() @ c.float().T, targets, reduction=reduction)
"""
MEMEFF = """
import torch
import torch.nn.functional as F

class MemoryEfficientCLIPLoss(torch.nn.Module):
    def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0,
            label_smoothing=0.0):
        super().__init__()
        assert normalized_inputs and not stable and isinstance(temperature, float)
        self.temperature = temperature

    def forward(self, image_features, text_features, tau_plus=None):
        z = image_features.float() @ text_features.float().T / self.temperature
        labels = torch.arange(len(z))
        return (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
"""


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Packages with the peers' signatures and plain PyTorch inside."""
    files = {
        "liger_kernel/__init__.py": "",
        "liger_kernel/transformers/__init__.py": "",
        "liger_kernel/transformers/functional.py": LIGER,
        "cut_cross_entropy/__init__.py": CCE,
        "memeff/__init__.py": MEMEFF,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    tops = ("liger_kernel", "cut_cross_entropy", "memeff")
    before = {name for name in sys.modules if name.partition(".")[0] in tops}
    assert not before
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("name", "operator", "dtype"),
    [
        ("liger", "prototype_cross_entropy", "float32"),
        ("liger", "teacher_kl_1", "float32"),
        ("liger", "teacher_kl_3", "float32"),
        ("cce", "prototype_cross_entropy", "bfloat16"),
        ("memeff", "contrastive", "float32"),
    ],
)
def test_peers_are_called_as_they_ask(packages: None, name: str, operator: str, dtype: str) -> None:
    case = Case(operator, 9, 9, 16, dtype)
    (result,) = measure_case(case, (name,), ("both",), seconds=1e-9)
    assert result.status == "timed", result.notes
    assert "gradient_error" in result.metrics and result.notes


@pytest.mark.parametrize(
    ("name", "operator", "dtype", "reason"),
    [
        ("liger", "dual_teacher_kl", "bfloat16", "no weight per row"),
        ("liger", "siglip", "bfloat16", "neither"),
        ("cce", "siglip", "bfloat16", "cross-entropy alone"),
        ("cce", "prototype_cross_entropy", "float32", "half precision"),
        ("memeff", "siglip", "bfloat16", "contrastive loss alone"),
    ],
)
def test_what_peers_do_not_have(
    packages: None, name: str, operator: str, dtype: str, reason: str
) -> None:
    assert reason in str(PROVIDERS[name].refusal(Case(operator, 4, 4, 8, dtype)))


def test_an_older_liger_has_no_kl(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import liger_kernel.transformers.functional as functional

    monkeypatch.delattr(functional, "liger_fused_linear_kl_div")
    reason = PROVIDERS["liger"].refusal(Case("teacher_kl_1", 4, 4, 8, "float32"))
    assert reason == "liger-kernel has no liger_fused_linear_kl_div"


def test_why_a_peer_is_not_here(packages: None, monkeypatch: pytest.MonkeyPatch) -> None:
    absence = PROVIDERS["memeff"].absence
    assert absence("cpu") == "wants a CUDA GPU" and absence("cuda") is None
    monkeypatch.undo()  # the packages are off the path again
    assert absence("cuda:1") == "memeff is not installed"


def test_what_a_peer_gets_wrong_is_no_failure_of_ours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rates = measure.ProductRates(torch_mm=1e9, similarity=1e9)
    monkeypatch.setattr(measure, "product_rate", lambda dtype, device: rates)
    monkeypatch.setattr(measure, "copy_rate", lambda device: 1e9)

    def wrong(x: Tensor, w: Tensor, scale: Tensor, target: Tensor) -> Tensor:
        return 2 * F.cross_entropy(scale * x @ w.T, target)

    given = ("--shapes", "6x5x4", "--ops", "prototype_cross_entropy", "--dtypes", "fp32")
    for peer, status in ((True, 0), (False, 1)):
        provider = Provider("torch_lce", lambda case: wrong, peer=peer)
        monkeypatch.setitem(PROVIDERS, "torch_lce", provider)
        arguments = [*given, "--seconds", "1e-9", "--providers", "torch_lce"]
        assert run_command(["bench", *arguments]) == status
        assert "torch_lce: failed: loss: relative error 1" in capsys.readouterr().out


# --- the command


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--largest"], ["--largest", "cpu", "GPU"]),
        (["--providers", "liger", "graph"], ["--providers", "liger wants a CUDA GPU"]),
        (["--budget", "-1"], ["--budget"]),
        (["plot", "gone.csv", "out"], ["gone.csv"]),
    ],
)
def test_bad_arguments(
    arguments: Sequence[str], said: Sequence[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["bench", *arguments]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error.count("\n") == 1 and all(part in error for part in said), error


def timed_rows() -> list[dict[str, str]]:
    rows = []
    for n in (4, 8):
        case = Case("siglip", n, n, 16, "float32")
        for name in ("eager", "mulki"):
            metrics = {
                "speed": Quantiles(2.0 * n, 1.5 * n, 3.0 * n),
                "throughput": Quantiles.same(100.0),
                "memory": Quantiles.same(0.0),
            }
            rows += rows_of(Result(case, name, "both", "timed", metrics=metrics), MACHINE)
        rows += rows_of(Result(case, "compile", "both", "failed"), MACHINE)
    return rows


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from mulki.bench.plots import plot

    (path,) = plot(timed_rows(), str(tmp_path / "figures"))
    assert path.name == "siglip_float32_both.png"
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_figures_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mulki.bench.plots import plot
    from mulki.errors import InputError

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.figure", raising=False)
    with pytest.raises(InputError, match="matplotlib is not installed"):
        plot(timed_rows(), str(tmp_path / "figures"))
    assert not (tmp_path / "figures").exists()


def test_the_benchmark_needs_torch_and_numpy_alone(tmp_path: Path) -> None:
    """As on a machine with torch, triton, numpy and pytest."""
    import subprocess

    code = (
        "import sys\n"
        "gone = 'rich yaml open_clip safetensors hypothesis jinja2 torchvision PIL matplotlib'\n"
        "sys.modules.update(dict.fromkeys(gone.split()))\n"
        "from mulki.cli import run_command\n"
        "import mulki.info\n"
        "assert 'torch' in str(mulki.info())\n"
        "given = '--shapes 4x4x8 --ops siglip --dtypes fp32 --modes both --seconds 0.001'\n"
        "given += ' --providers eager mulki --output ' + sys.argv[1]\n"
        "assert run_command(['bench', *given.split()]) == 0\n"
        "assert run_command(['bench', 'table', sys.argv[1]]) == 0\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "ops.csv")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| siglip | 4 x 4 x 8 | float32 | both |" in done.stdout
