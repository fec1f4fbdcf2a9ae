"""Mapped files: what memory holds of them and need not."""

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from pathlib import Path
from threading import RLock

from .memory_map import Region, read_memory_map

_MADV_DONTNEED = 4  # madvise(2)

opening = RLock()
"""Held while a session is opened: none takes what another maps for its own, nor opens in another's environment."""


@contextlib.contextmanager
def newly_mapped(folder: Path) -> Iterator[list[Region]]:
    """Yield a list that tells, at the end, where a session that is opened herein has mapped the folder's files.

    They stay there as long as the session does; afterwards other memory may stand at these addresses.
    """
    with opening:
        others, own = _regions(folder), list[Region]()
        yield own
        for start, end in _regions(folder):  # by address
            if all(end <= first or behind <= start for first, behind in others):
                is_next = bool(own) and own[-1][1] == start
                own.append((own.pop()[0] if is_next else start, end))  # of many small ones each call takes its time


def let_go(regions: Sequence[Region]) -> None:
    """Drop from memory what was read of mapped files; what is read once more comes back by itself.

    onnxruntime packs the weights of a graph's bodies as it opens it, and keeps the file that they came from mapped.
    Where the system is not Linux it drops such pages when memory is short.
    """
    if regions:
        madvise = ctypes.CDLL(None).madvise
        for start, end in regions:
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)


def _regions(folder: Path) -> list[Region]:
    """Return where this process has mapped the folder's files."""
    folder = folder.resolve()
    return [entry.region for entry in read_memory_map() if Path(entry.path).is_relative_to(folder)]
