"""What stands in for a GPU in `benchmarks/gpu.sh OUT --rehearse`.

python -m benchmarks.gpu.rehearsal sanitizer --tool racecheck ... COMMAND
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

_FALSE_ALARM = """\
========= Error: Race reported between Write access at rehearsed_kernel+0x1a0 in rehearsed.py:1
=========     and Write access at rehearsed_kernel+0x1a0 in rehearsed.py:1 [2 hazards]
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"""


def sanitizer(options: Sequence[str]) -> int:
    """Run the command that compute-sanitizer would be given; say what its tools would.

    `options` are pairs up to the command, a path. racecheck raises its known false alarm.
    """
    names = options[::2]
    end = 2 * next(i for i, name in enumerate(names) if not name.startswith("--"))
    given = dict(zip(options[:end:2], options[1:end:2], strict=True))
    status = subprocess.run(options[end:], check=False).returncode
    if status == 0 and given["--tool"] == "racecheck":
        print(_FALSE_ALARM)
        return int(given["--error-exitcode"])
    print("========= ERROR SUMMARY: 0 errors")
    return status


if __name__ == "__main__":
    sys.exit({"sanitizer": sanitizer}[sys.argv[1]](sys.argv[2:]))
