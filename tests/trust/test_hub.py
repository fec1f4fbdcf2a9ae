"""What comes from the hub is held against the hash that the hub gives; a broken download is never used."""

import hashlib
import http.server
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from gptedge_models import CheckpointError
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
    (snapshot / "config.json").write_text("{}")
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


class _Silent(http.server.BaseHTTPRequestHandler):
    """A hub that answers every request with an error."""

    def do_GET(self) -> None:
        self.send_error(503)

    do_HEAD = do_GET  # noqa: N815 - the server's name for it

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def broken_hub() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Silent)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_hub_that_does_not_answer_is_one_error_that_names_the_remedy(broken_hub: str, tmp_path: Path) -> None:
    code = (
        "from gptedge_models.hf import download\n"
        "from gptedge_models import CheckpointError\n"
        "try: download('owner/name')\n"
        "except CheckpointError as error: print(error)"
    )
    environment = {"HF_ENDPOINT": broken_hub, "HF_HOME": str(tmp_path), "PATH": "", "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "owner/name could not be fetched from the Hugging Face hub" in done.stdout
    assert done.stdout.endswith("or give the path of a downloaded folder\n")
