"""What is decided before the first step, and what is missing for it."""
