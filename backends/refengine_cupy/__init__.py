"""The CuPy backend: kernels for NVIDIA's and AMD's GPUs, compiled when they are first used."""
