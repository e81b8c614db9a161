"""Lets large tensors be allocated where others were freed, instead of anew from the system.

Source: no counterpart in the original codes; `mallopt` of glibc.
"""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager


# Of glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
DEFAULT_THRESHOLD = 128 * 1024
KEPT_BYTES = 1024**3


@contextmanager
def reused_memory() -> Iterator[None]:
    """Keeps up to 1 GB of freed memory for the next allocation, where the C library is glibc; else does nothing.

    A tensor of a hundred megabytes is memory that the system has to clear, page by page. In a conversion, which makes
    one after the other, that took four times as long as filling them.
    """
    libc = None
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)
        libc.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
    except (OSError, AttributeError):  # another C library
        pass
    try:
        yield
    finally:
        if libc is not None and hasattr(libc, "malloc_trim"):
            libc.mallopt(M_MMAP_THRESHOLD, DEFAULT_THRESHOLD)
            libc.mallopt(M_TRIM_THRESHOLD, DEFAULT_THRESHOLD)
            libc.malloc_trim(0)
