"""Memory that is moved to huge pages."""

import ctypes
import mmap
import platform
import time
from pathlib import Path

import pytest
from gptedge_runtime import huge_pages

SIZE = 16 << 20


def in_huge_pages(address: int) -> int:
    """Return how many KiB of the region at this address Linux tells to be in huge pages."""
    found = False
    for line in Path("/proc/self/smaps").read_text("utf-8").splitlines():
        name, _, rest = line.partition(" ")
        if "-" in name:
            start, end = (int(place, 16) for place in name.split("-"))
            found = start <= address < end
        elif found and name == "AnonHugePages:":
            return int(rest.split()[0])
    raise AssertionError("the address is in no region")


def has_huge_pages() -> bool:
    setting = huge_pages.SETTINGS / "enabled"
    if not setting.exists() or "[never]" in setting.read_text("ascii"):
        return False
    major, minor = platform.release().split(".")[:2]
    return (int(major), int(minor)) >= (6, 1)


@pytest.mark.skipif(not has_huge_pages(), reason="this kernel moves nothing to huge pages")
def test_what_is_allocated_inside_moves_and_keeps_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "DELAY_S_PER_GB", 0.0)
    with huge_pages.huge_pages():
        block = mmap.mmap(-1, SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # malloc may give what was freed before
        block.write(b"\7" * SIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(block))
    end = time.monotonic() + 60
    while in_huge_pages(address) < SIZE // 2 // 1024 and time.monotonic() < end:
        time.sleep(0.01)
    assert in_huge_pages(address) >= SIZE // 2 // 1024  # both ends may fill no huge page
    assert block[:] == b"\7" * SIZE


@pytest.mark.parametrize("setting", ["always madvise [never]", "always [madvise] never", None])  # 2nd: no page size
def test_nothing_moves_where_huge_pages_are_off(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, setting: str | None
) -> None:
    if setting is not None:
        (tmp_path / "enabled").write_text(setting)
    monkeypatch.setattr(huge_pages, "SETTINGS", tmp_path)
    monkeypatch.setattr(huge_pages, "Timer", None)  # calling it would fail
    with huge_pages.huge_pages():
        block = ctypes.create_string_buffer(SIZE)
    assert len(block) == SIZE
