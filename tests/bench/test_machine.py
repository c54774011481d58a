"""The line of versions and hardware."""

from __future__ import annotations

from mulki.bench.machine import describe_machine, setting_line


def test_the_line_of_a_machine() -> None:
    machine = describe_machine("cpu") | {"git_commit": "0123456789ab" + 28 * "c", "threads": "3"}
    line = setting_line(machine)
    assert f"mulki {machine['mulki_version']} (0123456789ab), torch" in line
    assert line.endswith(f"{machine['cpu_name']}, {machine['capability']}, threads: 3")
    assert "(0123456789ab, modified)" in setting_line(
        machine | {"git_commit": f"{machine['git_commit']}, modified"}
    )
    assert "(no checkout)" in setting_line(machine | {"git_commit": ""})
    on_gpu = setting_line(machine | {"gpu_name": "A Card", "triton_version": "3.6"})
    assert ", triton 3.6; A Card, " in on_gpu
