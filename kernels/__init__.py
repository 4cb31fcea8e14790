"""Kernels, each with its plain PyTorch twin: here by Triton for a GPU, in cpu/ by Numba for a CPU. They import
nothing of minivlm."""
