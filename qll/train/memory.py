"""Memory: what is free, and whether freed memory is kept or given back.

Training keeps it, instead of taking it again at every step: glibc maps each block of more than
128 kB anew, and the system clears its pages first: a fifth of the time of a training step on two
CPU cores (2.6 against 2.1 s per 1,024 tokens of a 135M model). Stages that only factor large matrices give it back.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch

# malloc.h of glibc; 32 MB is the largest threshold it takes
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT = ((_MMAP_THRESHOLD, 32 << 20), (_TRIM_THRESHOLD, 1 << 30), (_TOP_PAD, 256 << 20))
_RETURNED = ((_MMAP_THRESHOLD, 8 << 20), (_TRIM_THRESHOLD, 64 << 20), (_TOP_PAD, 1 << 20))


def keep_freed_memory() -> bool:
    """Ask the C library to keep up to 1 GB of freed memory; False where it is not glibc.

    >>> keep_freed_memory() in (True, False)
    True
    """
    return _set(_KEPT)


@contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Inside the `with` freed memory goes back to the system, and is kept again behind it.

    For work on few large matrices: blocks of 14 MB, freed and kept, were 3 GB of a K-FAC plan of
    one block of Llama 3 8B.

    >>> with freed_memory_returned():
    ...     float(torch.ones(2).sum())
    2.0
    """
    _set(_RETURNED)
    return_freed_memory()
    try:
        yield
    finally:
        return_freed_memory()
        _set(_KEPT)


def return_freed_memory() -> bool:
    """Ask the C library to give freed memory back to the system; False where there was none.

    Blocks of less than 32 MB stay with the process otherwise: 3.7 GB after the K-FAC calibration of
    one block of Llama 3 8B.

    >>> return_freed_memory() in (True, False)
    True
    """
    library = _glibc()
    return library is not None and library.malloc_trim(0) == 1


def _set(options: Sequence[tuple[int, int]]) -> bool:
    library = _glibc()
    return library is not None and all(library.mallopt(*pair) == 1 for pair in options)


def _glibc() -> ctypes.CDLL | None:
    """The C library, where it is that of GNU."""
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    return library if hasattr(library, "gnu_get_libc_version") else None


def free_bytes(device: torch.device) -> int:
    """Memory that could be taken now, on a GPU its own.

    >>> free_bytes(torch.device("cpu")) > 0
    True
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
