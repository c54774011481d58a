"""What a run leaves on disk of its models and its state, and how it goes on from there."""
