"""What becomes of memory that a step has freed: the C library keeps it for the next step, and in large pages."""

import ctypes
import os
import sys
from pathlib import Path

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
NEVER, HIGHEST = 2**31 - 1, 2**25  # bytes; glibc takes no higher threshold for blocks of their own
OFFER = Path("/sys/kernel/mm/transparent_hugepage/enabled")
TUNABLES, LARGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def keep_freed_memory() -> None:
    """Left alone, glibc hands memory back to the system after a step and asks for it in the next, page by page. A
    process still ends up with no more than its largest step needs."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, which has other ways
        return
    mallopt(MMAP_THRESHOLD, HIGHEST)
    mallopt(TRIM_THRESHOLD, NEVER)


def use_large_pages() -> None:
    """Begin this program again with memory in pages of 2 MiB, where Linux has them for whoever asks.

    Of what is read once and then not for a while, as weights, gradients and moments are by an optimizer step, small
    pages take long to find. glibc asks for large ones if a variable says so when a program begins.
    """
    as_a_script = sys.orig_argv[-len(sys.argv) :] == sys.argv  # else nobody knows how to begin it again
    if as_a_script and sys.gettrace() is None and ask_for_large_pages():  # a debugger would lose sight of it
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def ask_for_large_pages() -> bool:
    """Set the variable for programs that begin from now on; False if there are none to ask for or it is set already."""
    if TUNABLES in os.environ or not OFFER.exists() or "[madvise]" not in OFFER.read_text():
        return False
    os.environ[TUNABLES] = LARGE_PAGES
    return True
