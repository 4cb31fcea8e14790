"""Triton kernels, each below its plain PyTorch twin of the same signature. They import nothing of minivlm."""
