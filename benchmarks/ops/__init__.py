"""The operator benchmark: time, extra memory and error of the operators beside other ways.

This folder is the package `mulki.bench`, in a checkout and in an installed package. Import it by
that name, or its modules are loaded twice. ``mulki bench`` and ``python -m benchmarks.ops`` run it.

`cases` says what is computed, `providers` by what, `verify` whether rightly, `call_cost` how
fast and in how much memory, `report` what is shown and stored, and `run` puts them together.
"""
