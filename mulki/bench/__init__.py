"""The operator benchmark: time, extra memory and error of the operators beside other ways.

``mulki bench`` and ``python -m benchmarks.ops`` run it. `cases` says what is computed,
`providers` by what, `verify` whether rightly, `measure` how fast and in how much memory,
`report` what is shown and stored, and `run` puts them together.
"""
