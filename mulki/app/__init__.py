"""The command `mulki`, and what its commands do that training and reports do not."""
