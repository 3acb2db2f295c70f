"""The Numba backend: compiled kernels on the CPU, over weights laid out for its vector units."""
