"""What `benchmarks/gpu.sh` does.

`probe` looks what is there, `plan` says the steps, `steps` runs them; `small` is what runs under
compute-sanitizer.
"""
