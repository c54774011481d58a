"""Beside the modules that the tests of kernels share, in the interpreter and on a GPU."""
