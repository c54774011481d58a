"""The engine: runs a sequence of tasks. Encoders are called here and in evaluation only."""
