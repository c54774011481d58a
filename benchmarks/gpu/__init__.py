"""What `benchmarks/gpu.sh` does.

`probe` looks what is there, `plan` says the steps, `steps` runs them, and `races` judges what
racecheck reports. `small` is what runs under compute-sanitizer, and `rehearsal` stands in for what
only a GPU has.
"""
