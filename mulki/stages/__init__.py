"""The four stages of MulKI, one file each, and the objective that composes them.

The names are those of Knowledge Integration Theory as the paper uses them (arXiv 2411.06764). The
paper's equations are not public in full: each file says what is stated, what is convention of the
field, and what was our choice.
"""
