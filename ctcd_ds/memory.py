"""What freed memory of this process becomes: glibc gives large blocks back to the system, training wants them kept."""

from __future__ import annotations

import ctypes

# glibc's <malloc.h>
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """From now on a freed block stays with this process, for its next step. For processes that compute on the CPU.

    A step allocates the same gradients, activations and logits as the step before it. By default glibc returns
    each block above 32 MiB to the kernel, which hands it out again as zeroed pages, 4 KiB at a time, in one thread:
    a third of a step of three peers was spent so (docs/performance.md). Only this process's peak counts then,
    which it had anyway. Returns False where the C library is another one (then nothing changes).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # No block is a mapping of its own; the heap is never trimmed, and grows by 64 MiB at a time.
    return all([mallopt(M_MMAP_MAX, 0), mallopt(M_TRIM_THRESHOLD, -1), mallopt(M_TOP_PAD, 64 * 2**20)])
