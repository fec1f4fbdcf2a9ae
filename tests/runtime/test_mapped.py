"""What memory holds of mapped files goes, and comes back by itself."""

import mmap
import re
import sys
from pathlib import Path

import pytest
from gptedge_runtime import load
from gptedge_runtime.mapped import let_go

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def kilobytes_in_memory(path: Path) -> int:
    """Of this process's mappings of the file."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return sum(int(re.findall(r"^Rss: +(\d+)", block, re.MULTILINE)[0]) for block in blocks if str(path) in block)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_what_was_read_of_a_folders_files_leaves_memory_and_keeps_its_bytes(tmp_path: Path) -> None:
    inside, outside = tmp_path / "bundle" / "onnx" / "a b", tmp_path / "bundle2"
    inside.parent.mkdir(parents=True)
    maps = []
    for path in (inside, outside):
        path.write_bytes(CONTENT)
        with path.open("rb") as file:
            maps.append(mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE))
    assert all(mapped[:] == CONTENT for mapped in maps)
    let_go(tmp_path / "bundle")
    assert [kilobytes_in_memory(path) for path in (inside, outside)] == [0, 1024]
    assert maps[0][:] == CONTENT


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_bundle_whose_file_has_left_memory_writes_the_same(bundles: Path, name: str) -> None:
    with load(bundles / name) as gpt:
        before = gpt.generate_ids([1, 2, 3], max_new_tokens=20)
        let_go(bundles / name)
        assert gpt.generate_ids([1, 2, 3], max_new_tokens=20) == before
