"""The swap of an export: whenever it is killed, the bundle is the old one or the new one, whole."""

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
from gptedge_export.atomic import atomic_folder
from gptedge_export.errors import ExportError
from gptedge_runtime import BundleError, load
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.session import Session
from gptedge_runtime.verify import verify

from ..signing import sign

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the swap is two renames")

FILES = ["manifest.json", "onnx/a", "onnx/b", "c"]

Counter = Any  # a number that two processes see


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory, where flushing a file takes no time, so that a kill meets every step of an export."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as path:
        yield Path(path)


@contextlib.contextmanager
def exporter(target: Path, name: str) -> Iterator[Counter]:
    """Count the exports of a process that replaces ``target`` for ever, and kill it at the end of the block."""
    processes = multiprocessing.get_context("fork")
    counter = processes.Value("q", 0)
    process = processes.Process(target=_export_for_ever, args=(target, name, counter))
    process.start()
    try:
        yield counter
    finally:
        process.kill()
        process.join()


def _export_for_ever(target: Path, name: str, counter: Counter) -> None:
    for number in itertools.count():
        put(target, f"{name}{number}" + "x" * 5000)
        counter.value += 1


def wait_for(counter: Counter, number: int) -> None:
    while counter.value < number:
        time.sleep(0.001)


def read_all(target: Path) -> set[str]:
    first, *others = [(target / name).read_text() for name in FILES]
    return {str(json.loads(first)["text"]), *others}


def content(target: Path) -> str:
    """The one content of all four files; a mixture fails."""
    (text,) = read_all(target)
    assert sorted(p.relative_to(target).as_posix() for p in target.rglob("*") if p.is_file()) == sorted(FILES)
    return text


def nothing(number: int) -> None:
    """Do nothing before file ``number`` is written."""


def put(target: Path, text: str, *, replace: bool = True, before: Callable[[int], None] = nothing) -> None:
    """Export four files of one content."""
    with atomic_folder(target, replace=replace) as work:
        (work / "onnx").mkdir()
        for number, name in enumerate(FILES):
            before(number)
            (work / name).write_text(manifest(text) if name == "manifest.json" else text)


def manifest(text: str) -> str:
    return json.dumps({"text": text, "format_version": 1, "files": [{"path": name} for name in FILES[1:]]})


@pytest.mark.parametrize("seed", range(40))
def test_a_kill_at_any_moment_leaves_one_whole_bundle_and_the_next_export_cleans_up(folder: Path, seed: int) -> None:
    target = folder / "bundle"
    with exporter(target, "new") as counter:
        wait_for(counter, 2)
        time.sleep(random.Random(seed).uniform(0, 0.01))  # into some step of an export, which takes about 2 ms
    assert content(target).startswith("new")
    put(target, "last")
    assert content(target) == "last"
    assert list(folder.iterdir()) == [target]


def test_a_reader_never_sees_a_mixture_while_two_exports_replace_each_other(folder: Path) -> None:
    target, seen = folder / "bundle", set()
    put(target, "first")
    with exporter(target, "a") as one, exporter(target, "b") as other:
        while min(one.value, other.value) < 100:
            if texts := read_at_once(target):
                (text,) = texts
                seen.add(text)
    assert len(seen) > 1
    put(target, "last")
    assert list(folder.iterdir()) == [target]


def read_at_once(target: Path) -> set[str]:
    """The contents of the files of the folder that has the name now; none where it was removed in the meantime."""
    descriptor = os.open(target, os.O_RDONLY)
    try:
        return read_all(Path(f"/proc/self/fd/{descriptor}"))
    except FileNotFoundError:
        return set()
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("replace", [False, True])
def test_of_two_exports_without_a_bundle_one_wins(tmp_path: Path, replace: bool) -> None:
    target = tmp_path / "bundle"

    def overtake(number: int) -> None:
        if number == 2:
            put(target, "early", replace=replace)

    with pytest.raises(ExportError, match=r"exists|cannot write"):
        put(target, "late", replace=False, before=overtake)
    assert content(target) == "early"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("failing", range(len(FILES)))
def test_a_full_disk_leaves_the_old_bundle_and_says_so(tmp_path: Path, failing: int) -> None:
    target = tmp_path / "bundle"
    put(target, "old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(number: int) -> None:
        if number == failing:  # a write beyond this limit fails as one to a full disk does
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    try:
        with pytest.raises(ExportError, match="make room there") as caught:
            put(target, "x" * 5000, before=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(str(caught.value)) <= 300
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, ZeroDivisionError])
@pytest.mark.parametrize("failing", range(len(FILES)))
def test_an_error_inside_leaves_the_old_bundle_and_no_rest(
    tmp_path: Path, error: type[BaseException], failing: int
) -> None:
    target = tmp_path / "bundle"
    put(target, "old")

    def fail(number: int) -> None:
        if number == failing:
            raise error

    with pytest.raises(error):
        put(target, "new", before=fail)
    assert content(target) == "old"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("name", ["a[b]*", "-o", "with space", "ü", ".hidden"])
def test_leftovers_of_any_name_are_removed(tmp_path: Path, name: str) -> None:
    (tmp_path / f".{name}.tmp-killed").mkdir()
    put(tmp_path / name, "new")
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_the_folder_of_an_export_that_still_runs_is_no_leftover(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    put(target, "own", before=lambda number: put(target, "other"))
    assert content(target) == "own"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("old_is_open", [True, False])
def test_a_process_that_uses_the_old_bundle_keeps_its_answers(bundle: Path, bundles: Path, old_is_open: bool) -> None:
    def replace() -> None:
        with atomic_folder(bundle, replace=True) as folder:
            for path in sorted((bundles / "odd").rglob("*")):
                place = folder / path.relative_to(bundles / "odd")
                place.mkdir() if path.is_dir() else place.write_bytes(path.read_bytes())

    with load(bundle) as gpt:
        before = gpt.generate_ids([1, 2, 3], max_new_tokens=20)
        stream = gpt.stream("hello", max_new_tokens=40)
        text = next(stream) if old_is_open else ""
        replace()
        assert gpt.generate_ids([1, 2, 3], max_new_tokens=20) == before
        assert text + "".join(stream) == gpt.generate("hello", max_new_tokens=40)
    with load(bundle) as gpt:
        assert gpt.config.vocab_size == 257


def with_other_weights(bundle: Path, folder: Path) -> Path:
    """A sound bundle of the same graphs, byte for byte."""
    path = shutil.copytree(bundle, folder) / "onnx/model.onnx_data"
    weights = bytearray(path.read_bytes())
    for tensor in onnx.load(folder / "onnx/prefill.onnx", load_external_data=False).graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if tensor.data_type == onnx.TensorProto.UINT8 and place:
            start, length = int(place["offset"]), int(place["length"])
            weights[start : start + length] = bytes(byte ^ 0x55 for byte in weights[start : start + length])
    path.write_bytes(weights)
    return sign(folder)


@pytest.mark.parametrize("another_comes", [True, False])
@pytest.mark.parametrize(("name", "length"), [("long-int8", 120), ("long-int4", 300)])
def test_what_is_opened_late_is_not_another_bundles(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, length: int, another_comes: bool
) -> None:
    """A long prompt opens ``prefill.onnx``; where that is gone ``decode.onnx`` reads it."""
    bundle = shutil.copytree(bundles / name, tmp_path / "bundle")
    other = with_other_weights(bundle, tmp_path / "other")
    prompt = [7 * i % 250 for i in range(length)]
    with monkeypatch.context() as patch, load(bundle) as gpt:
        patch.setattr("gptedge_runtime.session.MIN_TOKENS", {})
        expected = gpt.generate_ids(prompt, max_new_tokens=20)
    with load(other) as gpt:
        assert gpt.generate_ids(prompt, max_new_tokens=20) != expected
    with load(bundle) as gpt:
        shutil.rmtree(bundle)
        if another_comes:
            other.rename(bundle)
        assert gpt.generate_ids(prompt, max_new_tokens=20) == expected


def test_a_bundle_that_is_overwritten_in_use_is_refused(bundles: Path, tmp_path: Path) -> None:
    """As by copying a new one into its folder: what is mapped of the weights is then the new one's."""
    bundle = shutil.copytree(bundles / "long-int8", tmp_path / "bundle")
    other = with_other_weights(bundle, tmp_path / "other")
    with load(bundle) as gpt:
        assert gpt.generate_ids([1, 2, 3], max_new_tokens=2)
        shutil.copytree(other, bundle, dirs_exist_ok=True)
        for call in (gpt.generate_ids, gpt.logits):
            with pytest.raises(BundleError, match=r"model\.onnx_data was overwritten while it was in use"):
                call([1, 2, 3])


def test_a_bundle_that_is_replaced_while_it_is_opened_is_refused(bundles: Path, tmp_path: Path) -> None:
    """Hashed is the one, and mapped the other."""
    folder = shutil.copytree(bundles / "long-int8", tmp_path / "bundle")
    opened = open_bundle(folder)
    other = with_other_weights(folder, tmp_path / "other")
    shutil.rmtree(folder)
    with pytest.raises(BundleError, match=r"cannot read .* \(No such file"):
        Session(opened, provider="cpu", threads=1)
    other.rename(folder)
    with pytest.raises(BundleError, match="was replaced while it was opened"):
        Session(opened, provider="cpu", threads=1)


@pytest.mark.parametrize("file", ["", "onnx/model.onnx_data", "manifest.json"])
def test_the_command_killed_over_a_bundle_leaves_the_old_one_or_the_new_one(
    bundle: Path, tmp_path: Path, file: str
) -> None:
    """Killed when its working folder holds this file."""
    before = open_bundle(bundle).files
    config = tmp_path / "config.json"
    config.write_text('{"vocab_size": 257, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 1}')
    program = Path(sys.executable).parent / "export-onnx"
    options: list[str | Path] = ["--config", config, "--tokenizer", "bytes", "-o", bundle, "--force", "-q"]
    with subprocess.Popen([program, "random", *options]) as running:
        while running.poll() is None:
            if any((work / file).exists() for work in tmp_path.glob(".bundle.tmp-*")):
                running.kill()
            time.sleep(0.001)
    after = open_bundle(bundle)
    assert after.files == before or after.model.vocab_size == 257
    assert verify(bundle).prompts > 0
    put(bundle, "next")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "config.json"]


@pytest.mark.parametrize("content", ['{"name": "my web app", "files": ["index.html"]}', "[]", "mine", "[" * 10**5])
def test_a_folder_with_a_manifest_of_other_kind_is_left_as_it_is(tmp_path: Path, content: str) -> None:
    target = tmp_path / "app"
    target.mkdir()
    (target / "manifest.json").write_text(content)
    with pytest.raises(ExportError, match="is no bundle"):
        put(target, "new")
    assert (target / "manifest.json").read_text() == content


def test_a_bundle_with_a_file_of_the_users_is_left_as_it_is(tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    put(target, "old")
    (target / "onnx/notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"holds onnx/notes\.txt"):
        put(target, "new")
    assert (target / "onnx/notes.txt").read_text() == "mine"
