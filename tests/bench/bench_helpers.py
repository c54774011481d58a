"""Cases and providers that the tests of the operator benchmark share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mulki.bench.cases import Case
from mulki.bench.losses import EAGER
from mulki.bench.machine import describe_machine
from mulki.bench.providers import Provider

LIGER_COLUMNS = (
    "kernel_name,kernel_provider,kernel_operation_mode,metric_name,metric_unit,x_name,x_label,"
    "x_value,y_value_50,y_value_20,y_value_80,extra_benchmark_config_str,gpu_name,timestamp,"
    "mulki_version"
)

CASE = Case("dual_teacher_kl", 7, 5, 16, "float32")
# Large enough that which rounding comes out smaller is no matter of luck.
VERIFIED = Case("dual_teacher_kl", 17, 33, 64, "float32")


def wrong_provider(calls: list[int] | None = None) -> Provider:
    """One percent too large, gradients and all."""

    def make(case: Case) -> Callable[..., Tensor]:
        def loss(*arguments: object) -> Tensor:
            if calls is not None:
                calls.append(1)
            return 1.01 * EAGER[case.operator](*arguments)

        return loss

    return Provider("wrong", make)


HEADER = [
    *LIGER_COLUMNS.split(","),
    *("torch_version", "triton_version", "cpu_name", "capability", "threads", "git_commit"),
    *("status", "note"),
]
MACHINE = dict.fromkeys(describe_machine("cpu"), "")
