"""What comes from the hub is held against the hash that the hub gives; a broken download is never used."""

import hashlib
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from gptedge_export import Vocabulary, load_vocabulary
from gptedge_export.hugging_face import export_hugging_face
from gptedge_models import CheckpointError, load_checkpoint
from gptedge_models.hf import checked

WEIGHTS = b"weights" * 1000


@pytest.fixture
def cached(tmp_path: Path) -> Path:
    """A snapshot as huggingface_hub keeps it: links to files that are named by their hash."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        content = WEIGHTS + name.encode()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(blob)
    for name in ("config.json", "tokenizer.json"):
        blob = blobs / hashlib.sha1(b"blob 2\0{}").hexdigest()  # what `git hash-object` gives
        blob.write_bytes(b"{}")
        (snapshot / name).symlink_to(blob)
    return snapshot


def test_weights_with_the_hubs_hash_are_used(cached: Path) -> None:
    assert checked(cached) == cached


@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize("fault", ["flipped bit", "cut short", "empty", "web page"])
def test_weights_with_another_hash_are_refused_by_name(cached: Path, shard: int, fault: str) -> None:
    path = sorted(cached.glob("*.safetensors"))[shard]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    content = {"flipped bit": bytes(data), "cut short": WEIGHTS, "empty": b"", "web page": b"<html></html>"}
    path.resolve().write_bytes(content[fault])
    with pytest.raises(
        CheckpointError, match=rf"{path.name} is not the file that the hub has.*delete .* and try again"
    ):
        checked(cached)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
PART = 11_000_000  # huggingface_hub keeps what it has by pieces of 10 MB


def test_a_tokenizer_with_another_hash_is_refused_by_name(cached: Path) -> None:
    (cached / "config.json").unlink()
    (cached / "tokenizer.json").resolve().write_bytes(b"[]")
    with pytest.raises(CheckpointError, match=r"tokenizer.json is not the file that the hub has, its SHA-1 differs"):
        checked(cached)


class Hub(http.server.ThreadingHTTPServer):
    """As much of the hub as huggingface_hub asks for; ``fault`` tells what goes wrong."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files: dict[str, bytes] = {}
        self.fault: Callable[[_Answer], bool] = lambda answer: False
        self.asked: list[tuple[str, str, str | None]] = []  # method, file, Range
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_GET(self) -> None:
        name = self.path.split("?")[0].rpartition("/")[2]
        self.server.asked.append((self.command, name, self.headers["Range"]))
        if self.server.fault(self):
            self.close_connection = True
        elif "/api/models/" in self.path:
            siblings = [{"rfilename": name} for name in self.server.files]
            self.send(json.dumps({"id": "owner/name", "sha": COMMIT, "siblings": siblings}).encode())
        elif name in self.server.files:
            self.send_file(self.server.files[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET  # noqa: N815 - the server's name for it

    def send_file(self, data: bytes, *, cut: int | None = None) -> None:
        """Send a file, or the rest that is asked for; cut off after so many bytes."""
        start = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        headers = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.send(data[start:], 206 if start else 200, headers, cut)

    def send(
        self, data: bytes, status: int = 200, headers: Mapping[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[:cut])

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.over.set()
        server.shutdown()


@pytest.fixture
def export(hub: Hub, tmp_path: Path) -> Callable[[], subprocess.CompletedProcess[str]]:
    """Run ``export-hf owner/name`` against the hub, whose library waits 1 second instead of 10."""
    limits = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DISABLE_XET": "1"}
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1", **limits}
    program = Path(sys.executable).with_name("export-hf")
    command: list[str | Path] = [program, "owner/name", "-o", tmp_path / "out"]

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | environment)

    return run


@pytest.fixture
def weights(hub: Hub, tmp_path: Path) -> bytes:
    """Of a GPT-2 that the hub has, a file of several parts."""
    sizes = {"vocab_size": 257, "context_length": 8, "emb_dim": 768, "n_heads": 2, "n_layers": 1}  # 28 MB
    model = load_checkpoint("random", config=sizes)
    export_hugging_face(model, tmp_path / "hf", vocabulary=load_vocabulary("bytes"))
    hub.files = {path.name: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    return hub.files["model.safetensors"]


Export = Callable[[], subprocess.CompletedProcess[str]]


def test_a_model_comes_from_the_hub_and_then_from_the_cache(
    hub: Hub, export: Export, weights: bytes, tmp_path: Path
) -> None:
    done = export()
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights
    shutil.rmtree(tmp_path / "out")
    hub.fault = lambda answer: True
    done = export()
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights


def test_the_tokenizer_is_the_repositorys_own(hub: Hub, export: Export, weights: bytes, tmp_path: Path) -> None:
    vocabulary = load_vocabulary("bytes")
    renamed = Vocabulary(vocabulary.ranks[1:] + vocabulary.ranks[:1], vocabulary.special_tokens)
    export_hugging_face(load_checkpoint(tmp_path / "hf"), tmp_path / "hf2", vocabulary=renamed)
    for names in (["tokenizer.json"], ["vocab.json", "merges.txt"]):
        for name in ("tokenizer.json", "vocab.json", "merges.txt"):
            hub.files.pop(name, None)
        hub.files |= {name: (tmp_path / "hf2" / name).read_bytes() for name in names}
        shutil.rmtree(tmp_path / "home", ignore_errors=True)
        done = export()
        assert (done.returncode, done.stderr) == (0, "")
        assert load_vocabulary(str(tmp_path / "out")).ranks == renamed.ranks
        shutil.rmtree(tmp_path / "out")


def test_a_repository_without_a_tokenizer_needs_one_to_be_named(hub: Hub, export: Export, weights: bytes) -> None:
    hub.files = {name: data for name, data in hub.files.items() if name in ("config.json", "model.safetensors")}
    done = export()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no tokenizer is known for 257 tokens: give one with --tokenizer\n"


def test_a_download_that_is_cut_off_goes_on_where_it_was(
    hub: Hub, export: Export, weights: bytes, tmp_path: Path
) -> None:
    def cut(answer: _Answer) -> bool:
        is_first = answer.command == "GET" and answer.path.endswith(".safetensors") and not answer.headers["Range"]
        if is_first:
            answer.send_file(weights, cut=2 * PART)
        return is_first

    hub.fault = cut
    done = export()
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "out/model.safetensors").read_bytes() == weights
    ranges = [asked for method, name, asked in hub.asked if (method, name) == ("GET", "model.safetensors")]
    assert len(ranges) == 2
    assert ranges[0] is None
    assert int(str(ranges[1]).removeprefix("bytes=").rstrip("-")) >= PART


def test_a_download_with_a_changed_byte_is_refused(hub: Hub, export: Export, weights: bytes) -> None:
    def change(answer: _Answer) -> bool:
        is_file = answer.command == "GET" and answer.path.endswith(".safetensors")
        if is_file:
            digest = hashlib.sha256(weights).hexdigest()
            answer.send(weights[:-1] + b"?", headers={"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        return is_file

    hub.fault = change
    done = export()
    assert (done.returncode, done.stdout) == (2, "")
    assert "model.safetensors is not the file that the hub has, its SHA-256 differs" in done.stderr


def refuse(answer: _Answer) -> bool:
    answer.send_error(503)
    return True


def hang_up(answer: _Answer) -> bool:
    return True


def say_nothing(answer: _Answer) -> bool:
    answer.server.over.wait()
    return True


def fall_silent(answer: _Answer) -> bool:
    """In the middle of each file of weights."""
    is_file = answer.command == "GET" and answer.path.endswith(".safetensors")
    if is_file:
        answer.send_file(WEIGHTS, cut=1000)
        say_nothing(answer)
    return is_file


@pytest.mark.parametrize("fault", [refuse, hang_up, say_nothing, fall_silent])
def test_a_hub_that_does_not_answer_is_one_error_that_names_the_remedy(
    hub: Hub, export: Export, fault: Callable[[_Answer], bool]
) -> None:
    """That it comes to an end is the fact: without limits of time, two of these would not."""
    hub.files = {"config.json": b"{}", "model.safetensors": WEIGHTS}
    hub.fault = fault
    done = export()
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: owner/name could not be fetched from the Hugging Face hub (")
    assert line.endswith(": check name and network, or give the path of a downloaded folder")


@pytest.mark.parametrize("files", [{}, {"config.json": b"{}"}], ids=["empty", "config alone"])
def test_a_repository_without_weights_is_named(hub: Hub, export: Export, files: dict[str, bytes]) -> None:
    hub.files = files
    done = export()
    assert (done.returncode, done.stdout) == (2, "")
    assert "owner/name has no model.safetensors on the hub" in done.stderr
