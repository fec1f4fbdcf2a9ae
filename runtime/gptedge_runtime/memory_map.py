"""What lies where in this process's memory, as Linux tells it."""

import contextlib
from pathlib import Path
from typing import NamedTuple

Region = tuple[int, int]
"""Addresses of the first byte and of the first behind."""


class Entry(NamedTuple):
    """A region, its permissions, and the file that stands behind it, or a name in brackets, or nothing."""

    region: Region
    permissions: str
    path: str


def read_memory_map() -> list[Entry]:
    """Return all regions by address; none where the system is not Linux."""
    entries = list[Entry]()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text("utf-8", "replace").splitlines():
            addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split("-"))
            entries.append(Entry((start, end), permissions, "".join(path)))
    return entries
