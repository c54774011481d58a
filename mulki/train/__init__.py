"""Training on a sequence of tasks. Encoders are called here and in evaluation only."""
