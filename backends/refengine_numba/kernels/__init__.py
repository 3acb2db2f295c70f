"""What is compiled: every kernel and its entry. All modules here need Numba, and nothing outside imports them
but :mod:`refengine_numba.compiler`, where a kernel has not been compiled before on this machine.
"""
