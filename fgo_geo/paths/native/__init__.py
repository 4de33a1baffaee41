"""The compiled path on the CPU: sweeps in C++ over convolution kernels and over lines."""
