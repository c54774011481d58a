"""Random cases for a given time: `python -m tests.fuzz operators` and `python -m tests.fuzz files`.

Hypothesis draws the cases and shrinks the one that fails.
"""
