"""One task: its batches, its teachers, its steps."""
