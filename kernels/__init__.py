"""Kernels, each with its plain PyTorch twin: by Triton for a GPU; single_row.py, by Numba, for a CPU. They import
nothing of minivlm."""
