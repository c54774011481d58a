"""Random cases of operators, wrong calls, readers of files and Triton kernels for a given time.

`python -m tests.fuzz operators`, and so on; see `__main__.py`.

Hypothesis draws the cases and shrinks the one that fails.
"""
