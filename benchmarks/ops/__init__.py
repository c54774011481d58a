"""What the operator benchmark measured; `packages` adds other packages' losses to `mulki.bench`."""
