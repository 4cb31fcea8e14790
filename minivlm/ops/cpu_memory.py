"""What the C library does with freed memory: here, keep it.

glibc gives a large buffer back to the system as soon as it is freed, and gets the next one page by page: every operator
of a forward pass then writes to new pages. For 512 positions of the shipped checkpoint's decoder, or 8 tiles of its
tower, that was 2,000 to 10,000 page faults and a quarter to two fifths of the time; with the memory kept it is none.
"""

import ctypes
import platform
from functools import cache

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # mallopt's names, from malloc.h
KEPT = 2**28  # bytes at a heap's end that stay
LARGEST = 2**25  # bytes of a buffer that comes from a heap, and the most that glibc takes here


@cache
def keep_freed() -> bool:
    """Tell glibc, for the whole process; False where the C library is another one, which is left as it is."""
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(TRIM_THRESHOLD, KEPT)) and bool(mallopt(MMAP_THRESHOLD, LARGEST))
