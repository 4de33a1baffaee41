"""The path on CUDA devices: sweeps in Triton over convolution kernels."""
