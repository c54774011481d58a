"""What the Triton kernels take, counted without a GPU."""
