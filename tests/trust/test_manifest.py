"""Each file and each field of a bundle, made wrong in each way: a documented error or the same answers, never more."""

import base64
import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gptedge_runtime import GPT, BundleError, GptEdgeError, load
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.graphs import Graph
from gptedge_runtime.session import Session
from gptedge_runtime.strict_json import parse_json
from gptedge_runtime.tokenizer import load_tokenizer
from gptedge_runtime.verify import verify

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]
Place = tuple[str | int, ...]

FILES = [
    "README.md", "config.json", "export_report.json", "genai_config.json", "generation_config.json",
    "known_answers.json", "manifest.json", "onnx/decode.onnx", "onnx/forward.onnx", "onnx/model.onnx",
    "onnx/model.onnx_data", "tokenizer.json", "tokenizer.tiktoken", "tokenizer_config.json",
]  # fmt: skip
NEEDED = ["known_answers.json", "onnx/decode.onnx", "onnx/forward.onnx", "onnx/model.onnx", "onnx/model.onnx_data",
          "tokenizer.tiktoken"]  # fmt: skip
VALUES: list[Any] = [
    None, True, 0, -1, 2**63, 10**400, 0.5, "", "\x00", "\x1b[31m", "../x", "\udc80", [], {}, [None], {"": ""},
]  # fmt: skip
INFORMATION = {"gptedge_version", "precision", "opset"}
"""Fields that no computation reads."""


def test_the_list_of_files_above_is_the_bundles(bundles: Path) -> None:
    folder = bundles / "tiny"
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    assert [name for name in found if name != "onnx/generate.onnx"] == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_hard_link_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    os.link(bundle / name, tmp_path / "other-name")
    with pytest.raises(BundleError, match=r"has 2 names \(hard links\): copy the bundle"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["folder", "pipe", "link to nothing", "link to a device", "link to itself"])
def test_what_is_no_plain_file_is_refused_before_it_is_opened(bundle: Path, name: str, kind: str) -> None:
    (bundle / name).unlink()
    if kind == "folder":
        (bundle / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(bundle / name)
    else:
        target: dict[str, str | Path] = {
            "link to nothing": "/nowhere",
            "link to a device": "/dev/zero",
            "link to itself": bundle / name,
        }
        (bundle / name).symlink_to(target[kind])
    with pytest.raises(BundleError, match=r"link or a special file|is missing"):
        open_bundle(bundle)


@pytest.mark.parametrize("name", FILES)
def test_each_file_in_the_place_of_another_is_found(bundle: Path, name: str) -> None:
    other = FILES[FILES.index(name) - 1]
    shutil.copyfile(bundle / other, bundle / "x")
    (bundle / "x").replace(bundle / name)
    with pytest.raises(BundleError):
        open_bundle(bundle)


@pytest.mark.parametrize("name", NEEDED)
@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"\xff" * 4096, b"<html>gone</html>", b"{}", b"[" * 10**5])
def test_a_file_of_rubbish_with_a_right_hash_is_one_documented_error(
    bundle: Path, edit: Edit, name: str, content: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    (bundle / name).write_bytes(content)
    with pytest.raises(GptEdgeError) as caught:
        verify(edit(lambda manifest: None))
    assert str(caught.value).isprintable()
    assert capfd.readouterr() == ("", "")


def places(value: Any, place: Place = ()) -> Iterator[Place]:
    """Every field and element, at every depth; of many tensors the first and the last."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        if place[-1:] in (("inputs",), ("outputs",)) and key not in (0, len(value) - 1):
            continue
        yield (*place, key)
        yield from places(child, (*place, key))


def put(manifest: Any, place: Place, value: Any) -> None:
    for key in place[:-1]:
        manifest = manifest[key]
    manifest[place[-1]] = value


def test_each_field_with_each_value_is_refused_or_changes_nothing(bundle: Path, edit: Edit) -> None:
    """All at once, since a case takes a few milliseconds; the failures are listed together."""
    edit(lambda manifest: None)
    manifest = json.loads((bundle / "manifest.json").read_text())
    failures, cases = [], 0
    for place in places(manifest):
        for value in VALUES:
            changed = copy.deepcopy(manifest)
            put(changed, place, value)
            (bundle / "manifest.json").write_text(json.dumps(changed))
            cases += 1
            try:
                opened = open_bundle(bundle)
                if place[0] == "tokenizer":
                    load_tokenizer(opened)
            except GptEdgeError as error:
                if not str(error).isprintable() or len(str(error)) > 300:
                    failures.append((place, str(value)[:20], "not one line"))
            except BaseException as error:  # whatever it is, it is not documented
                failures.append((place, str(value)[:20], repr(error)[:80]))
            else:
                if place[0] not in INFORMATION and not may_pass(place, value):
                    failures.append((place, str(value)[:20], "accepted"))
    assert failures == []
    assert cases > 1500


def may_pass(place: Place, value: Any) -> bool:
    """What opening cannot see: names, types and shapes of tensors (compared at load), other sizes, other patterns."""
    if place[0] == "graphs" and {"inputs", "outputs"} & set(place):
        return True
    return place[0] in ("model", "tokenizer") and place[-1] != "path"


@pytest.mark.parametrize("index", range(9))
@pytest.mark.parametrize("key", ["name", "dtype", "shape"])
@pytest.mark.parametrize("graph", ["decode", "forward", "generate", "model"])
@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_each_tensor_of_each_graph_is_compared(edit: Edit, graph: str, side: str, index: int, key: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        tensors = manifest["graphs"][graph][side]
        tensors[index % len(tensors)][key] = {"name": "other", "dtype": "float64", "shape": ["other"]}[key]

    opened = open_bundle(edit(change))
    with pytest.raises(BundleError, match=r"is .*, not "):
        Session(opened, provider="cpu", threads=1) if graph == "decode" else Graph(opened, graph, 1, None)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1e999}', b'{"a": "\\ud800"}', b'{"\\udfff": 1}', b'{"a": ' + b"[" * 990 + b"]" * 990 + b"}",
        b'{"a": 1,}', b"{'a': 1}", b'{"a": 01}', b'{"a": 1}x', b'{"a": "\n"}', b'{"a": \xff}', b'{"a": "\x00"}',
    ],
    ids=range(11),
)  # fmt: skip
def test_json_at_the_edge_is_refused_here_or_where_it_is_read(text: bytes) -> None:
    with pytest.raises(BundleError) as caught:
        parse_json(text, "manifest.json").number("a")
    assert "manifest.json" in str(caught.value)


PATTERNS = ["", "a*", "|", "(?=h)", r"\b", r"\p{L}*", r"\S+", "h", r"(?<=x)y", "$", "^", r"\G", r"[\s\S]??"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_that_loses_text_or_matches_nothing_is_refused_without_a_panic(
    edit: Edit, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    gpt = load(edit(lambda manifest: manifest["tokenizer"].update(pattern=pattern)))
    with pytest.raises(BundleError, match="pattern does not match all of the text"):
        gpt.generate("hi there")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("pattern", ["a)|(?:b", "(?x)a # b", "(", "[", "\\", "a{1000000000}", "(" * 10_000])
def test_a_pattern_that_is_no_regular_expression_is_refused(edit: Edit, pattern: str) -> None:
    with pytest.raises(BundleError, match="not a regular expression"):
        load(edit(lambda manifest: manifest["tokenizer"].update(pattern=pattern)))


def test_a_pattern_that_takes_for_ever_is_refused(edit: Edit) -> None:
    with (
        load(edit(lambda manifest: manifest["tokenizer"].update(pattern="(a|aa)+$"))) as gpt,
        pytest.raises(BundleError, match="takes too long"),
    ):
        gpt.generate("a" * 60 + "c")


@pytest.mark.parametrize("graph", ["decode", "forward", "generate", "model"])
def test_verify_finds_other_weights_behind_any_graph(bundle: Path, edit: Edit, graph: str) -> None:
    """A graph whose weights lie elsewhere in the file is sound in itself, and signed; only its answers are wrong."""
    onnx = pytest.importorskip("onnx")
    path = bundle / f"onnx/{graph}.onnx"
    model = onnx.load(path, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if "final_norm" not in t.name and t.external_data)
    offset = next(entry for entry in tensor.external_data if entry.key == "offset")
    offset.value = str(int(offset.value) + 64)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(GptEdgeError, match=rf"known answer \d: in the graph {graph}") as caught:
        verify(edit(lambda manifest: None))
    assert caught.value.exit_code == 3


def test_a_bundle_written_again_by_other_hands_still_loads(bundle: Path, edit: Edit, tiny: GPT) -> None:
    """What the faults above differ from: the same bundle, signed anew, with its ranks in other bytes."""
    ranks = (bundle / "tokenizer.tiktoken").read_bytes().splitlines()
    tokens = [base64.b64decode(line.split()[0]) for line in ranks]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    (bundle / "tokenizer.tiktoken").write_bytes(b"\r\n".join(lines))
    with load(edit(lambda manifest: None)) as gpt:
        assert gpt.generate("hello", max_new_tokens=20) == tiny.generate("hello", max_new_tokens=20)
