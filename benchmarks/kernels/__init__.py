"""What the Triton kernels become on each architecture, and what they may take there."""
