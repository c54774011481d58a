"""What is chosen without running a kernel: reasons, tiles, plans, timings, launches."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch

from mulki import kernels
from mulki.ops.operators import OPERATORS


@pytest.fixture
def triton(monkeypatch):
    """A module that can be imported as Triton, whether Triton is there or not."""
    monkeypatch.setitem(sys.modules, "triton", sys)


def test_every_operator_but_pair_kl_has_a_kernel():
    assert set(kernels.KERNELS) == {op for op in OPERATORS if not op.startswith("pair_kl")}
    assert all(kernels.KERNELS.count(op) == 1 for op in kernels.KERNELS)


def test_reasons_without_a_gpu(triton, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    op = "teacher_kl"
    assert "no Triton kernel for it" in kernels.why_not("sort", "cuda", torch.float32)
    assert "not torch.float64" in kernels.why_not(op, "cuda", torch.float64)
    assert "TRITON_INTERPRET=1" in kernels.why_not(op, "cpu", torch.float32)
    assert "no GPU" in kernels.why_not(op, "cuda", torch.float32)
    assert "not mps" in kernels.why_not(op, "mps", torch.float32)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.why_not(op, "cpu", torch.bfloat16) is None


@pytest.mark.parametrize(("capability", "serves"), [((7, 5), False), ((8, 0), True)])
def test_reason_of_an_old_gpu(capability, serves, triton, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    reason = kernels.why_not("siglip", "cuda", torch.float32)
    assert reason is None if serves else "8.0" in reason and "7.5" in reason


def test_reason_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    reason = kernels.why_not("siglip", "cuda", torch.float32)
    assert reason.startswith("triton is not importable (") and "install" in reason


def test_asking_imports_no_kernel():
    code = (
        "import sys, torch\nfrom mulki import kernels\n"
        "assert kernels.why_not('siglip', 'cuda', torch.float64)\n"
        "print([m for m in sys.modules if m == 'triton' or m.startswith('mulki.kernels.')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.stdout.strip() == "[]", done.stderr


tiles = importlib.import_module("mulki.kernels.tiles")
common = importlib.import_module("mulki.kernels.common")
KINDS = (
    *("rows", "rows small", "sums", "similarity", "similarity small"),
    *("slice", "part", "part small"),
)
FAMILIES = {"half": (True, "ieee"), "tf32": (False, "tf32"), "float": (False, "ieee")}


@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_complete(architecture, family):
    device = tiles.Device(architecture, *FAMILIES[family])
    assert device.family == family
    for kind in KINDS:
        for tile in device.tiles(kind):
            blocks = tile.kept, tile.streamed, tile.depth, *([tile.slice] if tile.slice else [])
            assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
        assert device.tiles(kind), kind
    assert len({plan.tile for plan in tiles.row_plans(device, 4096, 4096)}) > 1


@pytest.mark.parametrize(
    ("name", "known"),
    [
        *(("sm_80", "sm_80"), ("sm_89", "sm_86"), ("sm_90", "sm_90"), ("sm_103", "sm_100")),
        *(("sm_120", "sm_86"), ("gfx942", "gfx942"), ("gfx1100", "gfx942"), ("xpu", "gfx942")),
    ],
)
def test_unknown_architectures_take_the_entries_of_a_known_one(name, known):
    assert tiles.Device(name, True, "ieee").table_architecture == known


@pytest.mark.parametrize("architecture", tiles.ARCHITECTURES)
@pytest.mark.parametrize("half", [True, False])
def test_plans_cover_every_shape(architecture, half):
    device = tiles.Device(architecture, half, "ieee")
    for kept in (1, 64, 257, 4096, 65536):
        for streamed in (1, 100, 1000, 21841):
            plans = [*tiles.row_plans(device, kept, streamed)]
            for width in (1, 512, 768, 2048):
                for swap in (False, True):
                    plans += tiles.gradient_plans(device, kept, streamed, width, swap)
            for plan in plans:
                count = -(-streamed // plan.tile.streamed)
                each = -(-count // plan.splits)
                # None without a tile, and a merge can hold them all.
                assert 1 <= plan.splits <= count and (plan.splits - 1) * each < count
                assert plan.splits <= 128 or plan.schedule not in ("rows", "rows small")
            for plan in tiles.gradient_plans(device, kept, streamed, 512):
                scratch = plan.splits > 1 or plan.schedule.startswith("part")
                assert not scratch or plan.splits * kept * 512 * 4 <= tiles.PART_BYTES


def test_what_small_and_large_problems_take():
    device = tiles.Device("sm_90", True, "ieee")
    assert tiles.row_plans(device, 65536, 8192)[0].splits == 1
    assert tiles.row_plans(device, 64, 100)[0].schedule == "rows small"
    assert tiles.row_plans(device, 256, 21841)[0].splits > 30
    assert tiles.gradient_plans(device, 65536, 1000, 512)[0].schedule == "wide"
    assert tiles.gradient_plans(device, 65536, 1000, 768)[0].schedule == "slice"
    assert tiles.gradient_plans(device, 64, 100, 512)[0].schedule == "part small"


def test_chunks_stay_within_their_memory():
    device = tiles.Device("sm_90", True, "ieee")
    assert tiles.chunk_rows(device, 256, 1000, 3) == 0
    for p in (1024, 8192, 30000):
        rows = tiles.chunk_rows(device, 65536, p, 3)
        assert rows * p * (3 * 4 + 2) <= tiles.CHUNK_BYTES < 64 << 20
    assert tiles.chunk_rows(device, 8192, 8192, 3) == 512
    assert tiles.chunk_rows(tiles.Device("sm_90", False, "tf32x3"), 8192, 8192, 3) == 0
    for other in ("gfx942", "xpu", "interpreter"):
        assert tiles.chunk_rows(tiles.Device(other, True, "ieee"), 8192, 8192, 3) == 0


def test_precision(monkeypatch):
    monkeypatch.delenv("MULKI_INPUT_PRECISION", raising=False)
    single, half = torch.float32, torch.bfloat16
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "ieee"
        assert common.precision("sm_90", single) == "tf32x3"
        assert common.precision("gfx942", single) == "ieee"
        matmul.fp32_precision = "tf32"
        assert common.precision("sm_80", single) == "tf32"
        assert common.precision("gfx90a", single) == "ieee"
        assert common.precision("sm_80", half) == "ieee"
        monkeypatch.setenv("MULKI_INPUT_PRECISION", "ieee")
        assert common.precision("sm_80", single) == "ieee"
        monkeypatch.setenv("MULKI_INPUT_PRECISION", "high")
        with pytest.raises(ValueError, match="wanted one of ieee, tf32, tf32x3"):
            common.precision("sm_80", single)
        for architecture, refused in (("gfx942", "tf32x3"), ("gfx90a", "tf32")):
            monkeypatch.setenv("MULKI_INPUT_PRECISION", refused)
            with pytest.raises(ValueError, match=f"'{refused}', which {architecture} does not"):
                common.precision(architecture, single)
    finally:
        matmul.fp32_precision = before


@pytest.fixture
def autotune(monkeypatch, tmp_path):
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    module = importlib.import_module("mulki.kernels.autotune")
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_chosen", {})
    return module


PLANS = [tiles.Plan("rows", tiles.Tile(64 * i, 64, 32, 0, 8, 2), i) for i in (1, 2, 3)]


def test_the_default_is_taken_unless_asked_otherwise(autotune, monkeypatch):
    device = tiles.Device("sm_90", True, "ieee")
    monkeypatch.delenv("MULKI_AUTOTUNE", raising=False)
    assert autotune.run("rows", device, (5, 6), PLANS, lambda plan: plan) == PLANS[0]
    monkeypatch.setenv("MULKI_AUTOTUNE", "1")
    torch.use_deterministic_algorithms(True)
    try:
        assert autotune.run("rows", device, (5, 6), PLANS, lambda plan: plan) == PLANS[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert not autotune.cache_file().exists()


def test_the_fastest_is_kept_on_disk(autotune, monkeypatch):
    monkeypatch.setenv("MULKI_AUTOTUNE", "1")
    device = tiles.Device("sm_90", True, "ieee")
    timed = []

    def milliseconds(function):
        timed.append(function())
        return {64: 3.0, 128: 1.0, 192: float("inf")}[timed[-1].tile.kept]

    monkeypatch.setattr(autotune, "milliseconds", milliseconds)
    for _ in range(2):
        assert autotune.run("rows", device, (500, 600), PLANS, lambda plan: plan) == PLANS[1]
    assert timed == PLANS
    # Another process, a shape of the same size and other splits.
    monkeypatch.setattr(autotune, "_chosen", {})
    other = [plan._replace(splits=7) for plan in PLANS]
    assert autotune.run("rows", device, (400, 520), other, lambda plan: plan) == other[1]
    assert len(timed) == 3
    (key,) = json.loads(autotune.cache_file().read_text())
    assert key.startswith("rows sm_90 half 512x1024 triton ")
    # How float32 is multiplied, and how many teachers there are, make other kernels.
    keys = {
        autotune._key("rows", tiles.Device("sm_90", False, precision), (500, 600, 512, models))
        for precision in ("ieee", "tf32x3")
        for models in (3, 4)
    }
    assert len(keys) == 4
    # What is not a choice is made again, and what is no file is replaced.
    monkeypatch.setattr(autotune, "_chosen", {})
    autotune.cache_file().write_text("{")
    assert autotune.run("rows", device, (400, 520), other, lambda plan: plan) == other[1]
    assert len(timed) == 6


@pytest.fixture
def launches():
    """Records what an operator would launch on an architecture."""
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    launch = importlib.import_module("mulki.kernels.launch")

    def of(op, *arguments, architecture="sm_90", every_plan=False):
        with launch.recording(architecture, every_plan) as made:
            kernels.kernel(op)(*arguments)
        return [one for one in made if isinstance(one, launch.Launch)]

    return of


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def operands(n, p, d=64, dtype=torch.bfloat16):
    return meta(n, d, dtype=dtype), meta(p, d, dtype=dtype), meta(dtype=torch.float32)


def test_tf32_of_one_product_meets_no_tf32_of_another(launches, monkeypatch):
    monkeypatch.setenv("MULKI_INPUT_PRECISION", "tf32")
    for dtype, chunks in ((torch.bfloat16, True), (torch.float32, False)):
        rows = operands(8192, 8192, dtype=dtype)
        made = launches("contrastive_reduced", *rows, True, [True] * 3)
        assert ("chunk_gradient" in {one.kernel.__name__ for one in made}) == chunks
        # Cross-entropy takes its statistics from the products of which it makes G.
        target = meta(8192, dtype=torch.int64)
        options = target, None, 0.1, -100, True, [True] * 3
        made = launches("prototype_cross_entropy_reduced", *rows, *options)
        assert "chunk_gradient" in {one.kernel.__name__ for one in made}


@pytest.mark.parametrize(("n", "p"), [(20_000_000, 10), (10, 20_000_000)])
def test_grids_stay_within_their_limits(launches, n, p):
    rows = operands(n, p)
    target, three = meta(n, dtype=torch.int64), [True] * 3
    made = launches("similarity", *rows, True, every_plan=True)
    made += launches("similarity_backward", meta(n, p), *rows, True, three, every_plan=True)
    made += launches("prototype_cross_entropy_reduced", *rows, target, None, 0.1, -100, True, three)
    for one in made:
        assert 0 < one.grid[0] < 2**31 and all(0 < size <= 65535 for size in one.grid[1:])


def test_other_counts_are_no_other_kernel(launches):
    """What a kernel is compiled for, apart from tiles, does not follow N and P about."""
    ahead_of_time = importlib.import_module("mulki.kernels.ahead_of_time")
    found = set()
    for n, p in ((64, 4000), (65, 4016), (64, 4027), (63, 4039)):
        k = 2
        teachers = [meta(n, 64)] * k, [meta(p, 64)] * k, meta(k, dtype=torch.float32)
        target, mask = meta(n, dtype=torch.int64), meta(p, dtype=torch.bool)
        options = None, target, mask, 2.0, 1.0, 0.0, 1.0, True, True, [True, False, False]
        for one in launches("teacher_kl_reduced", *operands(n, p), *teachers, *options):
            variant = ahead_of_time._variant("", one, "sm_90", "bf16")
            parts = variant.kernel, variant.signature, variant.constants, variant.attributes
            found.add(repr(parts))
    assert len(found) == len({one.split(",")[0] for one in found})


def test_a_choice_that_cannot_be_kept_is_made_all_the_same(autotune, monkeypatch, tmp_path):
    monkeypatch.setenv("MULKI_AUTOTUNE", "1")
    (tmp_path / "file").touch()
    monkeypatch.setenv("MULKI_CACHE_DIR", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(autotune, "milliseconds", lambda function: -function().tile.kept)
    device = tiles.Device("sm_90", True, "ieee")
    with pytest.warns(UserWarning, match="could not be kept .* MULKI_CACHE_DIR"):
        assert autotune.run("rows", device, (500, 600), PLANS, lambda plan: plan) == PLANS[2]
    assert autotune.run("rows", device, (500, 600), PLANS, lambda plan: plan) == PLANS[2]


def test_what_a_graph_captures_is_what_was_chosen_before(autotune, monkeypatch):
    monkeypatch.setenv("MULKI_AUTOTUNE", "1")
    monkeypatch.setattr(autotune, "milliseconds", lambda function: -function().tile.kept)
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    device = tiles.Device("sm_90", True, "ieee")
    for now, plan in ((True, PLANS[0]), (False, PLANS[2]), (True, PLANS[2])):
        capturing[0] = now
        assert autotune.run("rows", device, (500, 600), PLANS, lambda plan: plan) == plan


LAUNCHES = """
import sys
from mulki.kernels import ahead_of_time
for architecture in ("sm_90", "gfx942"):
    for number_format in ahead_of_time.NUMBER_FORMATS:
        names = set()
        for variant in ahead_of_time.variants(architecture, number_format):
            names.add(variant.kernel.__name__)
            assert list(variant.signature) == variant.kernel.arg_names, variant.name
            assert variant.options["enable_fp_fusion"] is False
            assert all((path in variant.constants) == (variant.signature[name] == "constexpr")
                       for i, name in enumerate(variant.signature)
                       for path in [(i,)] if not isinstance(variant.signature[name], tuple))
        print(architecture, number_format, *sorted(names))
"""


def test_launches_of_every_operator_can_be_recorded():
    """On tensors without storage: nothing reads a value on the host."""
    pytest.importorskip("triton", reason="needs Triton, which this installation has not")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", LAUNCHES], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    kernels_of = {
        (line.split()[0], line.split()[1]): set(line.split()[2:])
        for line in done.stdout.splitlines()
    }
    everywhere = {
        *(
            "contrastive_rows",
            "prototype_cross_entropy_rows",
            "register_gradient",
            "scratch_gradient",
            "part_sums",
        ),
        *("project", "row_inverse_norms", "row_statistics", "row_totals", "scaled_product"),
        *("siglip_sums", "teacher_kl_rows"),
    }
    for (architecture, number_format), names in kernels_of.items():
        chunks = architecture == "sm_90" and number_format not in ("fp32", "ieee")
        assert names == (everywhere | {"chunk_gradient"} if chunks else everywhere)
    assert len(kernels_of) == 10
