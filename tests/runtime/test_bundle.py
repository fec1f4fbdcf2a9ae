"""What happens to a bundle on its way: every fault is one BundleError that names the file or the field."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gptedge_runtime import BundleError, BundleNotFoundError, GptEdgeError, VerificationError
from gptedge_runtime.bundle import MANIFEST_MAX_BYTES, open_bundle
from gptedge_runtime.errors import one_line
from gptedge_runtime.verify import verify
from hypothesis import given
from hypothesis import strategies as st

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]

FILES = [
    "README.md",
    "config.json",
    "export_report.json",
    "genai_config.json",
    "generation_config.json",
    "known_answers.json",
    "onnx/decode.onnx",
    "onnx/forward.onnx",
    "onnx/generate.onnx",
    "onnx/model.onnx",
    "onnx/model.onnx_data",
    "tokenizer.json",
    "tokenizer.tiktoken",
    "tokenizer_config.json",
]
each_file = pytest.mark.parametrize("name", FILES)
no_links = pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")


def untouched(manifest: dict[str, Any]) -> None:
    """Sign the files as they are."""


def test_the_list_of_files_above_is_the_bundles(bundle: Path) -> None:
    assert sorted(open_bundle(bundle).files) == FILES


def test_a_manifest_tells_model_and_precision(bundle: Path) -> None:
    opened = open_bundle(str(bundle))
    assert (opened.model.vocab_size, opened.model.context_length, opened.model.head_dim) == (270, 32, 8)
    assert (opened.precision, opened.gptedge_version) == ("fp32", "0.1.0")


@each_file
def test_one_flipped_bit_is_found(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / name).write_bytes(data)
    with pytest.raises(BundleError, match=rf"{name} is not the file that was exported"):
        open_bundle(bundle)


@each_file
def test_a_file_cut_short_is_found(bundle: Path, name: str) -> None:
    data = (bundle / name).read_bytes()
    (bundle / name).write_bytes(data[:-1])
    with pytest.raises(BundleError, match=rf"{name} has {len(data) - 1:,} bytes, not {len(data):,}"):
        open_bundle(bundle)


@each_file
def test_a_missing_file_is_found(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        open_bundle(bundle)


@no_links
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_symbolic_link_is_refused(bundle: Path, tmp_path: Path, name: str) -> None:
    shutil.move(bundle / name, tmp_path / "elsewhere")
    (bundle / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link or a special file"):
        open_bundle(bundle)


@no_links
def test_a_linked_folder_is_refused(bundle: Path, tmp_path: Path) -> None:
    shutil.move(bundle / "onnx", tmp_path / "elsewhere")
    (bundle / "onnx").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="onnx is a link or a special file"):
        open_bundle(bundle)


@no_links
@pytest.mark.parametrize("name", ["onnx/decode.onnx", "manifest.json"])
def test_a_pipe_is_refused_before_it_is_opened(bundle: Path, name: str) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)  # opening it would wait for a writer for ever
    with pytest.raises(BundleError, match="is a link or a special file"):
        open_bundle(bundle)


@no_links
def test_a_link_to_the_whole_bundle_is_fine(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "latest").symlink_to(bundle)
    assert open_bundle(tmp_path / "latest").files


@pytest.mark.parametrize("name", ["extra.txt", "onnx/extra.onnx", ".hidden", "new/extra"])
def test_a_file_that_is_not_listed_is_refused(bundle: Path, name: str) -> None:
    (bundle / name).parent.mkdir(exist_ok=True)
    (bundle / name).write_bytes(b"")
    with pytest.raises(BundleError, match=f"{name} is not a file of the bundle"):
        open_bundle(bundle)


def test_a_file_is_checked_again_when_it_is_read(bundle: Path) -> None:
    opened = open_bundle(bundle)
    (bundle / "tokenizer.tiktoken").write_bytes(b"changed since")
    with pytest.raises(BundleError, match=r"tokenizer\.tiktoken is not the file that was exported"):
        opened.read("tokenizer.tiktoken")


@pytest.mark.parametrize("path", ["nothing", "a\0b", "x" * 5000, ""])
def test_no_bundle_is_a_file_not_found_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleNotFoundError) as caught:
        open_bundle(path)
    assert isinstance(caught.value, FileNotFoundError)
    assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b"\xff\xfe{\x00}\x00", "not JSON"),
        (b'\xef\xbb\xbf{"format_version": 1}', "not JSON"),
        (b'{"format_version": NaN}', "holds NaN"),
        (b'{"format_version": -Infinity}', "holds -Infinity"),
        (b'{"format_version": 1, "format_version": 1}', "a key is given twice"),
        (b'{"format_version": %s}' % (b"9" * 5000), "not JSON"),
        (b"[" * 200_000, "not JSON"),
        (b'{"format_version": 2}', "upgrade gptedge"),
        (b'{"format_version": true}', "format_version is true"),
        (b'{"format_version": "1"}', 'format_version is "1"'),
        (b'{"format_version": 1.0}', r"format_version is 1\.0"),
        (b"{}", "format_version is missing"),
        (b" " * (MANIFEST_MAX_BYTES + 1), "larger than 1,048,576 bytes"),
    ],
    ids=range(17),
)
def test_a_manifest_that_is_not_strict_json_of_this_format_is_refused(bundle: Path, text: bytes, said: str) -> None:
    (bundle / "manifest.json").write_bytes(text)
    with pytest.raises(BundleError, match=said):
        open_bundle(bundle)


Field = tuple[str | int, ...]
FIELDS: list[Field] = [
    ("format_version",),
    ("gptedge_version",),
    ("precision",),
    ("opset",),
    ("files",),
    ("files", 0),
    ("files", 0, "path"),
    ("files", 0, "size"),
    ("files", 0, "sha256"),
    ("known_answers",),
    ("known_answers", "path"),
    ("model",),
    *[("model", key) for key in ("vocab_size", "context_length", "emb_dim", "n_heads", "n_layers", "qkv_bias")],
    ("tokenizer",),
    *[("tokenizer", key) for key in ("path", "pattern", "special_tokens", "eos_token_id")],
    ("tokenizer", "special_tokens", "<|endoftext|>"),
    ("graphs",),
    *[("graphs", name) for name in ("decode", "forward", "model")],
    *[("graphs", "decode", key) for key in ("path", "inputs", "outputs")],
    ("graphs", "forward", "inputs", 0),
    *[("graphs", "decode", "inputs", 0, key) for key in ("name", "dtype", "shape")],
]
ELEMENTS: list[Field] = [  # may be absent
    ("files", 0),
    ("tokenizer", "special_tokens", "<|endoftext|>"),
    ("graphs", "forward"),
    ("graphs", "model"),
    ("graphs", "forward", "inputs", 0),
]


def name_of(field: Field) -> str:
    return ".".join(map(str, field))


def put(manifest: Any, field: Field, value: Any) -> None:
    for key in field[:-1]:
        manifest = manifest[key]
    manifest[field[-1]] = value


@pytest.mark.parametrize("field", FIELDS, ids=name_of)
@pytest.mark.parametrize("value", [-1, 1.5, [1.5], {"a": None}], ids=["negative", "fraction", "array", "object"])
def test_a_field_of_the_wrong_type_is_refused(edit: Edit, field: Field, value: Any) -> None:
    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(edit(lambda manifest: put(manifest, field, value)))


@pytest.mark.parametrize("field", [f for f in FIELDS if f not in ELEMENTS], ids=name_of)
def test_a_missing_field_is_refused(edit: Edit, field: Field) -> None:
    def remove(manifest: Any) -> None:
        for key in field[:-1]:
            manifest = manifest[key]
        del manifest[field[-1]]

    with pytest.raises(BundleError, match=r"manifest\.json"):
        open_bundle(edit(remove))


@pytest.mark.parametrize("key", ["files", "known_answers", "tokenizer", "graphs"])
@pytest.mark.parametrize(
    "path",
    [
        "../x",
        "/etc/passwd",
        "onnx/../x",
        "./x",
        "onnx//x",
        "onnx/",
        "",
        "..",
        "a\\b",
        "C:x",
        "a\0b",
        "a\nb",
        "manifest\u2024json",
    ],
)
def test_a_path_that_leaves_the_folder_is_refused(edit: Edit, key: str, path: str) -> None:
    field = {"files": ("files", 0), "graphs": ("graphs", "decode")}.get(key, (key,))
    with pytest.raises(BundleError, match="a relative path inside the bundle"):
        open_bundle(edit(lambda manifest: put(manifest, (*field, "path"), path)))


@pytest.mark.parametrize("key", ["known_answers", "tokenizer", "graphs"])
def test_a_path_that_files_does_not_list_is_refused(edit: Edit, key: str) -> None:
    field = ("graphs", "decode") if key == "graphs" else (key,)
    with pytest.raises(BundleError, match="other is used but not in files"):
        open_bundle(edit(lambda manifest: put(manifest, (*field, "path"), "other")))


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].append(manifest["files"][0]),
        lambda manifest: manifest["files"].append({"path": "manifest.json", "size": 1, "sha256": "0" * 64}),
        lambda manifest: manifest["files"][0].update(sha256="0" * 63),
        lambda manifest: manifest["files"][0].update(sha256="G" * 64),
    ],
    ids=["twice", "itself", "short hash", "no hash"],
)
def test_a_wrong_entry_of_files_is_refused(edit: Edit, change: Callable[[dict[str, Any]], object]) -> None:
    with pytest.raises(BundleError, match="in files is wrong or doubled"):
        open_bundle(edit(change))


@pytest.mark.parametrize("key", ["vocab_size", "context_length", "emb_dim", "n_heads", "n_layers"])
@pytest.mark.parametrize("size", [0, 2**30, 10**30])
def test_a_size_that_would_fill_the_memory_is_refused(edit: Edit, key: str, size: int) -> None:
    with pytest.raises(BundleError, match=f"{key} is {size}"):
        open_bundle(edit(lambda manifest: manifest["model"].update({key: size})))


def test_heads_that_do_not_divide_the_width_are_refused(edit: Edit) -> None:
    with pytest.raises(BundleError, match="emb_dim 32 is no multiple of 5 heads"):
        open_bundle(edit(lambda manifest: manifest["model"].update(n_heads=5)))


def test_verify_counts_what_it_checked(bundle: Path) -> None:
    done = verify(bundle)
    prompts = len(json.loads((bundle / "known_answers.json").read_text())["prompts"])
    assert (done.files, done.graphs, done.prompts) == (len(FILES), 4, prompts)


def test_verify_finds_weights_that_were_changed_and_signed_again(bundle: Path, edit: Edit) -> None:
    data = bytearray((bundle / "onnx/model.onnx_data").read_bytes())
    data[3::400] = bytes(byte ^ 0x80 for byte in data[3::400])  # the sign of each hundredth weight
    (bundle / "onnx/model.onnx_data").write_bytes(data)
    with pytest.raises(VerificationError, match="logits differ by"):
        verify(edit(untouched))


@pytest.mark.parametrize("key", ["logits", "new_token_ids"])
def test_verify_finds_another_answer(bundle: Path, edit: Edit, key: str) -> None:
    path = bundle / "known_answers.json"
    answers = json.loads(path.read_text("utf-8"))
    values = answers["prompts"][-1][key]
    values[0] = values[0] + 0.5 if key == "logits" else (values[0] + 1) % 270
    path.write_text(json.dumps(answers), "utf-8")
    with pytest.raises(VerificationError, match="known answer"):
        verify(edit(untouched))


@pytest.mark.parametrize(
    "answers",
    [
        {"atol": 1e-4, "prompts": []},
        {"atol": 1e-4, "prompts": [{}]},
        {"atol": 1e-4, "prompts": [{"token_ids": [], "new_token_ids": [], "logit_ids": [], "logits": []}]},
        {"atol": 1e-4, "prompts": [{"token_ids": [1], "new_token_ids": [], "logit_ids": [], "logits": []}]},
        {"atol": 1e-4, "prompts": [{"token_ids": [1], "new_token_ids": [], "logit_ids": [999], "logits": [0.5]}]},
        {"atol": 1e-4, "prompts": [{"token_ids": [1], "new_token_ids": [], "logit_ids": [1, 2], "logits": [0.5] * 3}]},
        {"atol": 1e-4, "prompts": [{"token_ids": [1], "new_token_ids": [], "logit_ids": [1], "logits": ["x"]}]},
        {"atol": "x", "prompts": [{"token_ids": [1], "new_token_ids": [], "logit_ids": [1], "logits": [0.5]}]},
    ],
    ids=range(8),
)
def test_verify_refuses_answers_that_are_none(bundle: Path, edit: Edit, answers: Any) -> None:
    (bundle / "known_answers.json").write_text(json.dumps(answers), "utf-8")
    with pytest.raises(BundleError):
        verify(edit(untouched))


@pytest.mark.parametrize("name", ["forward", "model"])
def test_verify_compares_every_graph_with_the_manifest(edit: Edit, name: str) -> None:
    path = edit(lambda manifest: manifest["graphs"][name]["inputs"][0].update(name="other"))
    with pytest.raises(BundleError, match=rf"onnx/{name}\.onnx"):
        verify(path)


@given(text=st.text())
def test_an_error_is_one_printable_line(text: str) -> None:
    line = str(GptEdgeError(text))
    assert len(line) <= 300
    assert all(letter.isprintable() for letter in line)


def test_a_long_error_keeps_its_beginning_and_its_remedy() -> None:
    line = one_line("cause " + "x" * 1000 + " remedy")
    assert line.startswith("cause ")
    assert line.endswith(" remedy")
