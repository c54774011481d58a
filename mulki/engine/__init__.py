"""The engine: runs a sequence of tasks. It alone encodes images and texts."""
