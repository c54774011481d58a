#!/usr/bin/env bash
# Tests and measures the Triton kernels on one GPU, in under eight minutes:
#
#     benchmarks/gpu.sh OUT                  # logs, CSV, figures and summary.txt go to the folder OUT
#     benchmarks/gpu.sh OUT --seconds 900    # with more time
#     benchmarks/gpu.sh OUT --rehearse       # throughput of tiny shapes on the CPU, by the same code
#
# Needs torch, triton, numpy and pytest; PYTHON names another interpreter. Whatever is not there is
# skipped, and the summary says why. The exit status is 1 only where something failed.
set -euo pipefail
if [[ $# -eq 0 || $1 == -* ]]; then
    sed -n '2,9s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$out" "${@:2}"
