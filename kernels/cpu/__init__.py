"""Kernels of a CPU, compiled by Numba. In reading order:

compact.py            weights in fewer bits, the same numbers
few_bits.py           products with compact, int8 and int4 weights: what they compute, plainly
single_row.py         of one row with weights as stored, or without AVX-512; attention of rows to a cache
attention_prefill.py  attention of many queries
recording.py          a step's kernels one behind the other, without Python between them
*_numba.py            the same, compiled: a kernel runs in all threads, which share the outputs
weight_rows.py, cache_rows.py, tiles.py  their inner loops, in vectors of LLVM and in tiles of AMX
compiling.py, openmp.py, llvm_vectors.py  what all of these are made of
"""
