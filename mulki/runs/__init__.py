"""The folder of a run: its files, each written and read here, and the numbers in them."""
