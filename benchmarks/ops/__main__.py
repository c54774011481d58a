"""The operator benchmark with losses of other packages; `mulki bench` is the same without them.

python -m benchmarks.ops --help
python -m benchmarks.ops --quick
python -m benchmarks.ops --output ops.csv
python -m benchmarks.ops table ops.csv
"""

import sys

import benchmarks.ops.packages  # noqa: F401
from mulki.app.cli import main

main(["bench", *sys.argv[1:]])
