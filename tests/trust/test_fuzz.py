"""A short run of the fuzzers in tests/fuzz; what they found stands here as seeds and inputs."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from gptedge_runtime import BundleError, load
from hypothesis import given
from hypothesis import strategies as st

from ..fuzz import graphs
from ..fuzz.readers import READERS, read

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]

MANIFEST = b'{"format_version": 1, "files": [], "graphs": {"decode": {}}, "model": {"vocab_size": 1}, "tokenizer": {}}'
PIECES = st.sampled_from(
    [b"{", b"}", b"[", b'"', b":", b"1e999", b"null", b"\xff", b"AA== 0\n", b"(", b"*", b"|", b"\n"]
)


@given(kind=st.integers(0, len(READERS) - 1), pieces=st.lists(PIECES | st.binary(max_size=8), max_size=30))
def test_readers_give_a_value_or_a_documented_error(kind: int, pieces: list[bytes]) -> None:
    read(bytes([kind]) + b"".join(pieces))


@given(place=st.integers(0, len(MANIFEST) - 1), piece=st.binary(max_size=4))
def test_a_changed_manifest_gives_a_documented_error(place: int, piece: bytes) -> None:
    read(b"\0" + MANIFEST[:place] + piece + MANIFEST[place + len(piece) :])


def test_a_graph_whose_names_are_not_utf_8_is_one_error_and_prints_nothing(
    bundle: Path, edit: Edit, capfd: pytest.CaptureFixture[str]
) -> None:
    """Found by the fuzzer: onnxruntime's own message was no UTF-8 then, and it printed a banner and tried again."""
    path = bundle / graphs.GRAPH
    model = onnx.load(path, load_external_data=False)
    model.graph.node[0].op_type = "Unknown!"
    path.write_bytes(model.SerializeToString().replace(b"Unknown!", b"Unknown\xc6"))
    with pytest.raises(BundleError, match=r"refuses onnx/decode\.onnx"):
        load(edit(lambda manifest: None))
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="cases are forked")
@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["tiny", "int8"])
def test_changed_graphs_neither_kill_nor_hang_the_process(bundles: Path, name: str, seed: int) -> None:
    assert graphs.find(bundles / name, seed) is None
