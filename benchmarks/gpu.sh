#!/usr/bin/env bash
# Tests and measures the Triton kernels on one GPU, in under ten minutes:
#
#     benchmarks/gpu.sh OUT                  # the folder OUT gets summary.txt, ops.csv, tables.md
#     benchmarks/gpu.sh OUT --seconds 900    # and results.tar.gz, which also has logs and figures
#     benchmarks/gpu.sh OUT --rehearse       # every step without a GPU, tiny: nothing is measured
#
# Needs torch, triton, numpy, pytest, and a C compiler with Python.h for Triton; PYTHON names another
# interpreter. Whatever else is not there is skipped, and the summary says why. The exit status is 1
# only where something failed, and 2 where nothing could be run.
set -euo pipefail
if [[ $# -eq 0 || $1 == -* ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -m benchmarks.gpu "$out" "${@:2}"
