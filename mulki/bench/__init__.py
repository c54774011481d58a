"""The operator benchmark: time, extra memory and error of the operators beside other ways.

`mulki bench` runs it, `mulki doctor` measures with it, and so do the scripts in
`benchmarks/` of the repository, which hold what was measured.

`cases` says what is computed, `providers` by what, `verify` whether rightly, `call_cost` how
fast and in how much memory, `report` what is shown and stored, and `run` puts them together.
"""
