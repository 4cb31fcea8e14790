"""Kernels of a CPU, compiled by Numba. In reading order:

compact.py     weights in fewer bits, the same numbers
few_rows.py    products of a few rows with compact, int8 and int4 weights: what they compute, plainly
single_row.py  of one row with weights as stored, or without AVX-512; attention of rows to a cache
recording.py   a step's kernels one behind the other, without Python between them
*_numba.py     the same, compiled: a kernel runs in all threads, which share the outputs
weight_rows.py, cache_rows.py  their inner loops, in vectors of LLVM
compiling.py, openmp.py, llvm_vectors.py  what all of these are made of
"""
