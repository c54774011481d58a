"""The operator benchmark from a checkout; `mulki bench` is the same.

python -m benchmarks.ops --help
python -m benchmarks.ops --quick
python -m benchmarks.ops --output ops.csv
python -m benchmarks.ops table ops.csv
"""

import sys

from mulki.app.cli import main

main(["bench", *sys.argv[1:]])
