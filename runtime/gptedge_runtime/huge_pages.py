"""Linux's huge pages for the weights: on small pages a step, which reads all weights, waits for their addresses.

onnxruntime keeps a copy of the weights and asks for no huge pages, as numpy does for its arrays. Where the kernel is
older or the system another one nothing changes.
"""

import contextlib
import ctypes
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Timer

from .memory_map import Region, read_memory_map

SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
DELAY_S_PER_GB = 8.0  # moving takes a second of the memory for each, which shorter runs would not win back
CALL_BYTES = 64 << 20  # of one call, which waits for each processor: of a page at a time it takes ten times as long
REST = 1  # times as long as a call took: the steps that run meanwhile need the memory, too
_MADV_COLLAPSE = 25  # madvise(2), since Linux 6.1


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Move what is allocated inside to huge pages, later and in the background."""
    page = _page_bytes()
    before = _regions() if page else []
    yield
    ends, starts = dict(before), {end: start for start, end in before}
    grown = [(ends.get(start, start), starts.get(end, end)) for start, end in _regions()] if page else []
    large = [(start, end) for start, end in grown if end - start >= page]
    if large:
        delay_s = DELAY_S_PER_GB * sum(end - start for start, end in large) / 2**30
        timer = Timer(delay_s, _collapse, [large, page])
        timer.daemon = True
        timer.start()


def _page_bytes() -> int:
    """Return the size of a huge page; 0 where the system has none, hides them or says never."""
    try:
        is_off = "[never]" in (SETTINGS / "enabled").read_text("ascii")
        return 0 if is_off or sys.platform != "linux" else int((SETTINGS / "hpage_pmd_size").read_text("ascii"))
    except OSError:
        return 0


def _regions() -> list[Region]:
    """Return the memory that the process may write and that no file stands behind."""
    return [entry.region for entry in read_memory_map() if entry[1:] in (("rw-p", ""), ("rw-p", "[heap]"))]


def _collapse(regions: list[Region], page: int) -> None:
    madvise, step = ctypes.CDLL(None).madvise, max(page, CALL_BYTES)
    for start, end in regions:
        end -= end % page
        for place in range(-(-start // page) * page, end, step):
            began = time.perf_counter()
            madvise(ctypes.c_void_p(place), ctypes.c_size_t(min(step, end - place)), _MADV_COLLAPSE)
            time.sleep(REST * (time.perf_counter() - began))
