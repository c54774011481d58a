"""Kernels compiled ahead of time for GPUs that are not here: memory, registers, instructions.

A sample is compiled, and with --long all of it. The committed report has all variants, and must be
the report of today's variants.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace

import pytest

pytest.importorskip("triton", reason="needs Triton, which this installation has not")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 takes the place of the compilers", allow_module_level=True)

import triton
from triton import knobs

from benchmarks.kernels.ahead_of_time import NUMBER_FORMATS, Variant, variants
from benchmarks.kernels.compiled import (
    Compiled,
    all_compiled,
    assembly,
    compile_all,
    compile_variant,
    ir,
    sass,
    try_compile,
)
from benchmarks.kernels.limits import SHARED, WITHOUT_PRODUCTS, multiplies, violations
from benchmarks.kernels.report import ARCHITECTURES, HERE, all_variants, read, render
from mulki.kernels.common import next_power_of_2
from mulki.kernels.schedule import Problem, plan
from mulki.kernels.softmax_loss import StoredTile
from mulki.kernels.whole_rows import WholeTile
from tests.sweeps import swept

pytestmark = pytest.mark.usefixtures("triton_cache")

RENEW = "run python -m benchmarks.kernels (--output benchmarks/kernels/oldest with that Triton)"
#: Elsewhere the kernel of whole rows would spill, and the library multiplies.
MULTIPLYING = [architecture for architecture in ARCHITECTURES if architecture != "gfx1100"]


def sample() -> list[Variant]:
    """What is compiled here: a variant of each kernel, and in most other formats of three."""
    chosen = {}
    for variant in all_variants():
        where = variant.architecture, variant.number_format
        name = variant.kernel.__name__
        whole = variant.number_format == "bf16" or where in (("sm_90", "fp32"), ("gfx942", "fp32"))
        if whole or name in ("whole_rows", "scaled", "row_totals"):
            chosen.setdefault((*where, name), variant)
    return list(chosen.values())


@pytest.fixture(scope="module")
def compiled() -> list[Compiled]:
    return compile_all(sample())


#: The report of a newer Triton, and that of the oldest supported one.
FOLDERS = (HERE, HERE / "oldest")


@pytest.fixture(scope="module", params=FOLDERS, ids=["new", "oldest"])
def folder(request):
    return request.param


@pytest.fixture(scope="module")
def report(folder) -> list[Compiled]:
    return read(folder / "compiled.csv")


def version_of(folder) -> str:
    return re.search(r"^Triton (\S+) ", (folder / "RESULTS.md").read_text(), re.MULTILINE)[1]


def broken(rows: list[Compiled]) -> dict[str, list[str]]:
    return {row.name: violations(row) for row in rows if violations(row)}


@pytest.mark.slow
def test_compiled_kernels_keep_their_limits(compiled):
    assert broken(compiled) == {}
    seen = {(row.architecture, row.number_format, multiplies(row)) for row in compiled}
    wanted = {(a, n, False) for a in ARCHITECTURES for n in NUMBER_FORMATS}
    assert seen == wanted | {(a, n, True) for a in MULTIPLYING for n in NUMBER_FORMATS}
    without = {row.kernel for row in compiled if not row.dots}
    assert without == WITHOUT_PRODUCTS


def test_a_variant_of_each_kernel_compiles():
    """With the oldest Triton, too: make test-oldest leaves out what is slow."""
    first = first_of_each("sm_90", "bf16")
    assert broken([compile_variant(variant) for variant in first.values()]) == {}
    assert len(first) == 9


@pytest.mark.long
def test_every_variant_is_as_the_report_says(report, folder):
    made_with = version_of(folder)
    if triton.__version__ != made_with:
        pytest.skip(f"the report was made with Triton {made_with}, this is {triton.__version__}")
    today = all_variants()
    places = [number - 1 for number in swept(len(today), 12)]
    made = compile_all([today[place] for place in places])
    assert made == [report[place] for place in places], RENEW


def test_no_product_is_asynchronous(report):
    """Such as wgmma, whose operands compilers before ptxas 13.3 may write over while it reads."""
    wrong = ("wgmma", "tcgen05")
    assert not [row.name for row in report if any(name in row.instructions for name in wrong)]


def first_of_each(architecture: str, number_format: str) -> dict[str, Variant]:
    found: dict[str, Variant] = {}
    for variant in variants(architecture, number_format):
        found.setdefault(variant.kernel.__name__, variant)
    return found


@pytest.mark.parametrize("tile", ["rows=16", "rows=32"])
@pytest.mark.parametrize("number_format", ["bf16", "fp16", "fp32"])  # fp32: three of tf32
@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_no_instruction_multiplies_asynchronously(architecture, number_format, tile):
    """The same in the machine's own code, by this Triton: nothing reads registers later."""
    disassembler = getattr(knobs.nvidia, "nvdisasm", None)
    if disassembler is None or not os.path.exists(disassembler.path):
        pytest.skip("needs nvdisasm, which this Triton has not")
    # The first: with 16 rows the sample has compiled it already.
    variant = next(
        variant
        for variant in variants(architecture, number_format)
        if variant.kernel.__name__ == "whole_rows" and variant.tile.startswith(f"{tile} ")
    )
    names = set(
        re.findall(r"^\s+/\*\w{4}\*/\s+(?:@!?U?P\w+ )?([A-Z]\w+)", sass(variant), re.MULTILINE)
    )
    assert "HMMA" in names, names
    later = {"HGMMA", "QGMMA", "IGMMA", "BGMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "UTCOMMA"}
    assert not names & later


ARITHMETIC = r"= arith\.(\w+) (%[\w.#]+), (%[\w.#]+).* : (?:tensor<\S*xi32>|i32) loc"


def of_32_bits(ttir: str) -> list[str]:
    """Products in 32 bits, but for those of a program's number, or a loop's, with a constant."""
    constants = set(re.findall(r"(%\w+) = arith\.constant", ttir))
    numbers = set(re.findall(r"(%\w+) = tt\.get_program_id", ttir))
    numbers |= set(re.findall(r"scf\.for (%\w+) =", ttir))
    found = []
    for match in re.finditer(ARITHMETIC, ttir):
        name, operands = match[1], {match[2], match[3]}
        small = operands & constants and operands & numbers
        if name == "muli" and not small:
            found.append(match[0])
    return found


def test_no_offset_is_a_product_of_32_bits():
    """N P, P D, and the statistics of N rows may pass 2^31."""
    kernels = first_of_each("sm_90", "bf16") | first_of_each("sm_90", "fp16")
    assert {name: of_32_bits(ir(variant)) for name, variant in kernels.items()} == {
        name: [] for name in WITHOUT_PRODUCTS | {"whole_rows"}
    }
    both = next(
        variant
        for variant in variants("sm_90", "fp16")
        if variant.signature.get("sizes") == ("i32", "i32")
    )
    # Nor is a place of N rows, or of the elements of a result, a sum of 32 bits.
    for variant in (both, kernels["row_count"], kernels["row_totals"]):
        assert not re.search(ARITHMETIC.replace(r"(\w+)", "(addi|muli)", 1), ir(variant))


def loops(ptx: str) -> list[str]:
    """What lies between a label and a branch back to it."""
    found = []
    for label in re.finditer(r"^(\$L\w+):", ptx, re.MULTILINE):
        branch = re.compile(rf"\bbra(?:\.uni)?\s+{re.escape(label[1])};")
        if end := branch.search(ptx, label.end()):
            found.append(ptx[label.end() : end.start()])
    return found


@pytest.mark.slow
def test_stored_logits_are_read_sixteen_bytes_at_a_time_with_few_barriers():
    """Whether masked or not; and a tile takes no barrier for its statistics, one for its G."""
    tried = 0
    for variant in variants("sm_90", "bf16"):
        if variant.kernel.__name__ != "stored_rows":
            continue
        (tile,) = (v for v in variant.constants.values() if isinstance(v, StoredTile))
        ptx, models = assembly(variant), len(variant.signature["y_ptrs"])
        gradient = variant.signature["g_ptr"] != "constexpr"
        reads = tile.statistics * (1 if tile.whole else 2) + (gradient and not tile.whole)
        each = models * tile.rows * tile.columns // (32 * variant.options["num_warps"])
        assert ptx.count("ld.global.v4.b32") * 4 == reads * each, variant.name
        barriers = [loop.count("bar.sync") for loop in loops(ptx)]
        if variant.signature["inputs"].class_mask == "constexpr":  # a mask takes more
            # Within the loop over rows.
            in_loops = [0] * tile.statistics + [1] * gradient
            assert barriers[1:] == ([] if tile.whole else in_loops), variant.name
            assert tile.rows > 1 or ptx.count("bar.sync") <= 12 * models, variant.name
        tried += 1
    assert tried >= 10


@pytest.mark.slow
def test_the_report_has_todays_figures(compiled, report, folder):
    made_with = version_of(folder)
    if triton.__version__ != made_with:
        pytest.skip(f"the report was made with Triton {made_with}, this is {triton.__version__}")
    known = {(row.architecture, row.number_format, row.identity): row for row in report}
    differ = [
        row.name
        for row in compiled
        if known[row.architecture, row.number_format, row.identity] != row
    ]
    assert differ == [], RENEW


def test_the_report_has_todays_entries(report):
    def key_of(row: Compiled) -> tuple[object, ...]:
        where = (
            row.architecture,
            row.number_format,
            row.operator,
            row.kernel,
            row.tile,
            row.identity,
        )
        return *where, row.warps, row.stages

    today = [
        (e.architecture, e.number_format, e.operator, e.kernel.__name__, e.tile, e.identity)
        + (e.options["num_warps"], e.options["num_stages"])
        for e in all_variants()
    ]
    assert len(set(today)) == len(today) > 500
    assert sorted(map(key_of, report)) == sorted(today), RENEW


def test_the_report_keeps_the_limits(report):
    assert broken(report) == {}


@pytest.mark.parametrize("number_format", ["bf16", "fp32", "tf32"])
def test_the_largest_tiles_of_whole_rows_are_in_the_report(number_format, report):
    """Those that calls take, by their rows: a larger one may not fit, or spill."""
    compiled = {}
    for row in report:
        if row.kernel == "whole_rows" and row.number_format == number_format:
            rows, columns = map(int, re.match(r"rows=(\d+) columns=(\d+)", row.tile).groups())
            logits = columns * (3 if row.operator == "teacher_kl" else 1)
            compiled[rows] = max(compiled.get(rows, 0), logits)
    family = {"bf16": "half", "fp32": "float"}.get(number_format, number_format)
    for models in (1, 3):
        for n in (64, 2048, 4096, 8192, 16384, 40000, 65536, 200000):
            for p in (10, 30, 60, 100, 128, 200, 256):
                problem = Problem(n, p, (512,) * models, family, True, whole=True)
                taken = plan(problem)
                if taken.schedule == "rows":
                    assert models * next_power_of_2(p) <= compiled[taken.rows], (n, taken)


def test_the_report_is_what_its_lines_say(report, folder):
    text = (folder / "RESULTS.md").read_text()
    versions = re.search(r"^(Triton .*; ptxas \S+ and \S+)\.$", text, re.MULTILINE)[1]
    assert render(report, versions) == text, RENEW


# What the checks above are worth: entries that are wrong on purpose.


def one_of(architecture: str, number_format: str, kernel: str, tile: str = "") -> Variant:
    return next(
        variant
        for variant in variants(architecture, number_format)
        if variant.kernel.__name__ == kernel and tile in variant.tile
    )


def changed(variant: Variant, options: dict[str, int] | None = None, **of_tile: object) -> Variant:
    """A variant of `whole_rows` with other options, and other fields of its tile."""
    constants = {
        path: value._replace(**of_tile) if isinstance(value, WholeTile) else value
        for path, value in variant.constants.items()
    }
    assert constants != variant.constants or not of_tile
    return replace(variant, constants=constants, options={**variant.options, **(options or {})})


@pytest.mark.parametrize(
    ("architecture", "fewer_registers"),
    [("sm_80", {"maxnreg": 40}), ("gfx942", {"waves_per_eu": 8})],
)
def test_spilled_registers_are_found(architecture, fewer_registers):
    variant = one_of(architecture, "bf16", "whole_rows")
    wrong = violations(compile_variant(changed(variant, fewer_registers)))
    assert re.fullmatch(r"\d+ bytes of stack, limit 16", wrong[0])
    if architecture == "gfx942":
        assert re.fullmatch(r"\d+ registers spilled, limit 0", wrong.pop())
    assert len(wrong) == 1


def test_a_program_of_more_threads_than_a_gpu_takes_is_found(report):
    row = next(row for row in report if row.architecture == "gfx942" and row.kernel == "row_totals")
    assert violations(replace(row, warps=32)) == ["2048 threads, limit 1024"]


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "gfx942"])  # sm_100 has that of sm_90
def test_too_much_shared_memory_is_found(architecture):
    variant = one_of(architecture, "bf16", "whole_rows", "columns=256")
    # AMD's compiler takes a minute for five stages.
    stages = 3 if architecture.startswith("gfx") else 5
    wrong = compile_variant(changed(variant, {"num_stages": stages}, depth=128))
    problem = f"{wrong.shared} bytes of shared memory, limit {SHARED[architecture]}"
    assert wrong.shared > SHARED[architecture] and violations(wrong) == [problem]


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100", "gfx942"])  # sm_80: as sm_90
def test_tf32_in_strict_float32_is_found(architecture):
    variant = one_of(architecture, "ieee", "whole_rows")
    assert violations(compile_variant(variant)) == []
    wrong = violations(compile_variant(changed(variant, precision="tf32")))
    assert len(wrong) == 1 and "tf32" in wrong[0].replace("xf32", "tf32")


@pytest.mark.parametrize("architecture", ["sm_90", "sm_100"])
def test_a_single_tf32_product_for_tf32x3_is_found(architecture):
    variant = one_of(architecture, "fp32", "whole_rows")
    right = compile_variant(variant)
    assert violations(right) == [] and right.products == 3 * right.dots
    wrong = compile_variant(changed(variant, precision="tf32"))
    assert any("wanted three each" in problem for problem in violations(wrong))
    # A compiler that did not split them would be found too.
    unsplit = replace(right, products=right.dots)
    assert any("wanted three each" in problem for problem in violations(unsplit))


def test_products_without_tensor_cores_are_found():
    plain = compile_variant(one_of("sm_80", "ieee", "whole_rows"))
    assert plain.dots and plain.instructions == ""
    assert violations(replace(plain, number_format="tf32")) == ["no matrix instruction"]
    half = compile_variant(one_of("sm_80", "bf16", "whole_rows"))
    assert "does not multiply fp16" in violations(replace(half, number_format="fp16"))[0]
    stored = replace(half, kernel="stored_rows")
    assert violations(stored) == ["a product where none is expected"]


def test_what_does_not_compile_is_named():
    right = one_of("sm_80", "bf16", "row_inverse_norms")
    wrong = one_of("sm_80", "bf16", "whole_rows")
    outcomes = [try_compile(right), try_compile(changed(wrong, rows=48))]
    assert isinstance(outcomes[0], Compiled)
    with pytest.raises(RuntimeError, match=r"(?s)^1 kernels do not.*sm_80 bf16 \w+ whole_rows"):
        all_compiled(outcomes)
