"""Operators: what the public functions compute, apart from how their arguments are checked.

`reference` defines every operator in plain PyTorch. Faster kernels of the same operators are
chosen here when they exist; none of them may change a result beyond rounding.
"""
