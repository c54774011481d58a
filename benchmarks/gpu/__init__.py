"""What `benchmarks/gpu.sh` does.

`toolchain` and `probe` look what is there, `plan` says the steps, `steps` runs them, and `races`
judges what racecheck reports. `small` is what runs under compute-sanitizer, `proof` is
`mulki prove` as a step, and `rehearsal` stands in for what only a GPU has.
"""
