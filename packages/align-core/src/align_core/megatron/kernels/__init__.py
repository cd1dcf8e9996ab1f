"""Triton kernels for CUDA, one operation a file; each has a plain torch form elsewhere that the CPU uses."""
