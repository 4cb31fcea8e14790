"""Kernels of a CPU, compiled by Numba. Each has a file with its plain PyTorch twin and one, *_numba.py, with itself."""
