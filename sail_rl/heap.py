"""What becomes of memory that a step has freed: the C library keeps it for the next step."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
NEVER, HIGHEST = 2**31 - 1, 2**25  # bytes; glibc takes no higher threshold for blocks of their own


def keep_freed_memory() -> None:
    """Left alone, glibc hands memory back to the system after a step and asks for it in the next, page by page. A
    process still ends up with no more than its largest step needs."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, which has other ways
        return
    mallopt(MMAP_THRESHOLD, HIGHEST)
    mallopt(TRIM_THRESHOLD, NEVER)
