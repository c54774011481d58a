"""What compute-sanitizer's racecheck reports, and which of it is known to be a false alarm.

After a reduction several threads of Triton's kernels write one result to one address of shared
memory, and racecheck calls that a race where the results differ in their last bits (issue 7264 of
triton-lang/triton). It is seen by its form: an instruction that writes races with itself alone.
"""

from __future__ import annotations

import re

_COMPLAINT = re.compile(
    r"^=+ (?:(?:\w+ )*error\b(?! SUMMARY)|Warning: |Program hit)", re.IGNORECASE
)
_RACE = re.compile(r"^=+ \w+: Race reported between (\w+) access at (.+)", re.IGNORECASE)
_OTHER = re.compile(r"^=+ +and (\w+) access at (.+?)(?: \[\d+ hazards?\])?$", re.IGNORECASE)


def false_alarms(log: str) -> int:
    """How many races a log reports, if nothing is amiss but the known false alarm; else 0."""
    lines = [line.rstrip() for line in log.splitlines()]
    if "Traceback (most recent call last):" in lines:
        return 0
    count = 0
    for i, line in enumerate(lines):
        if not _COMPLAINT.match(line):
            continue
        race = _RACE.match(line)
        if race is None or not _is_of_itself(race, lines[i + 1 :]):
            return 0
        count += 1
    return count


def _is_of_itself(race: re.Match[str], after: list[str]) -> bool:
    others = 0
    for line in after:
        other = _OTHER.match(line)
        if other is None:
            break
        if other.groups() != race.groups() or race[1].lower() != "write":
            return False
        others += 1
    return others > 0
