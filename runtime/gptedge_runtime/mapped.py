"""Mapped files: what memory holds of them and need not."""

import contextlib
import ctypes
import sys
from pathlib import Path

_MADV_DONTNEED = 4  # madvise(2)


def let_go(folder: Path) -> None:
    """Drop from memory what was read of the folder's mapped files; what is read once more comes back by itself.

    onnxruntime packs the weights of a graph's bodies as it opens it, and keeps the file that they came from mapped.
    Where the system is not Linux it drops such pages when memory is short.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
            addresses, *_, path = line.split(maxsplit=5)
            if Path(path).is_relative_to(folder.resolve()):
                start, end = (int(address, 16) for address in addresses.split("-"))
                madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_DONTNEED)
