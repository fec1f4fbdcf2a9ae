"""What memory holds of mapped files goes, and comes back by itself."""

import mmap
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from gptedge_runtime import load
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.limits import never
from gptedge_runtime.mapped import let_go, newly_mapped
from gptedge_runtime.prefill import Prefill
from gptedge_runtime.session import Session

CONTENT = bytes(range(256)) * 4096  # 1 MiB


def kilobytes_in_memory(path: Path) -> int:
    """Of this process's mappings of the file."""
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return sum(int(re.findall(r"^Rss: +(\d+)", block, re.MULTILINE)[0]) for block in blocks if str(path) in block)


needs_proc = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def mapped(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)


@needs_proc
def test_what_was_read_of_newly_mapped_files_leaves_memory_and_keeps_its_bytes(tmp_path: Path) -> None:
    new, old, outside = paths = [tmp_path / name for name in ("bundle/onnx/a b", "bundle/onnx/old", "bundle2")]
    new.parent.mkdir(parents=True)
    for path in paths:
        path.write_bytes(CONTENT)
    maps = [mapped(old)]
    with newly_mapped(tmp_path / "bundle") as regions:
        maps += [mapped(new), mapped(outside)]
    assert all(each[:] == CONTENT for each in maps)
    let_go(regions)
    assert [kilobytes_in_memory(path) for path in paths] == [0, 1024, 1024]
    assert all(each[:] == CONTENT for each in maps)


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_bundle_whose_file_has_left_memory_writes_the_same(bundles: Path, name: str) -> None:
    with newly_mapped(bundles / name) as regions:
        gpt = load(bundles / name)
    assert regions or sys.platform != "linux"
    with gpt:
        before = gpt.generate_ids([1, 2, 3], max_new_tokens=20)
        let_go(regions)
        assert gpt.generate_ids([1, 2, 3], max_new_tokens=20) == before


@needs_proc
def test_when_a_prompt_is_read_its_weights_have_left_memory(bundles: Path) -> None:
    bundle, file = open_bundle(bundles / "long-int8"), bundles / "long-int8" / "onnx" / "model.onnx_data"
    session = Session(bundle, provider="cpu", threads=1)
    buffers = session.new_key_values(1, 160)
    before, prefill = kilobytes_in_memory(file), Prefill(bundle, 1)
    prefill.read([1, 2, 3] * 50, buffers, never)
    assert kilobytes_in_memory(file) == before
    prefill._read_part(np.array([1, 2, 3]), [(array[:, :, :0], array[:, :, :3]) for array in buffers], never)
    assert kilobytes_in_memory(file) > before


def test_weights_leave_memory_each_time_that_a_stop_is_asked_for(
    bundles: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which is while the graph runs; how much it has read by then is a matter of time."""
    prefill, calls = Prefill(open_bundle(bundles / "long-int8"), 1), list[object]()
    session = Session(open_bundle(bundles / "long-int8"), provider="cpu", threads=1)
    monkeypatch.setattr("gptedge_runtime.prefill.let_go", calls.append)

    def asked() -> bool:
        calls.append("asked")
        return False

    prefill.read([1, 2, 3] * 50, session.new_key_values(1, 160), asked)
    n_asked = calls.count("asked")
    assert n_asked > 0
    assert calls == [prefill._weights, "asked"] * n_asked + [prefill._weights]
