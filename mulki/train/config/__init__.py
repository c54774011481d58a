"""The options of a run, where they come from, and its tasks."""
