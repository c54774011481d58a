"""What the operator benchmark measured; its code is the package `mulki.bench`."""
