"""`gptedge web` without a browser: which files it finds, serves and writes. The page itself: tests/examples."""

import http.client
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

import pytest
from gptedge_runtime import GptEdgeError
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.web import ORT_DIST, ORT_FILES, Server, Site, site, write_site


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """What stands for onnxruntime-web: no byte of it is read here."""
    folder = tmp_path / ORT_DIST
    folder.mkdir(parents=True)
    for name in ORT_FILES:
        (folder / name).write_text(name)
    return folder


@pytest.fixture
def files(bundles: Path, dist: Path) -> Site:
    return site(open_bundle(bundles / "tiny"), dist)


@pytest.fixture
def server(files: Site) -> Iterator[Server]:
    with Server(files, port=0) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(server: Server, path: str, *, method: str = "GET", host: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request(method, path, headers={"Host": host or f"127.0.0.1:{server.server_port}"})
    return connection.getresponse()


def test_every_file_is_served_as_it_is(server: Server, files: Site) -> None:
    for name, path in files.items():
        response = ask(server, f"/{name}")
        assert (response.status, response.read()) == (200, path.read_bytes())


def test_the_root_is_the_page_with_the_headers_that_threads_need(server: Server) -> None:
    response = ask(server, "/?query")
    assert response.getheader("Content-Type") == "text/html; charset=utf-8"
    assert response.getheader("Cross-Origin-Opener-Policy") == "same-origin"
    assert response.getheader("Cross-Origin-Embedder-Policy") == "require-corp"
    assert b"<title>gptedge</title>" in response.read()


@pytest.mark.parametrize(
    "path",
    ["/bundle/onnx/decode.onnx", "/bundle", "/ort/", "/../manifest.json", "//etc/passwd", "/bundle/%2e%2e/x", "/x\\y"],
)
def test_nothing_else_is_served(server: Server, path: str) -> None:
    assert ask(server, path).status == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS"])
def test_only_get_is_answered(server: Server, method: str) -> None:
    assert ask(server, "/", method=method).status == 501


@pytest.mark.parametrize("host", ["example.com", "example.com:80", "127.0.0.1.example.com"])
def test_a_foreign_name_for_this_address_is_refused(server: Server, host: str) -> None:
    assert ask(server, "/", host=host).status == 403


def test_it_listens_to_this_computer_only(server: Server) -> None:
    assert server.server_address[0] == "127.0.0.1"
    assert urlsplit(server.url).port == server.server_port


def test_the_page_gets_what_the_manifest_lists_for_it(files: Site, bundles: Path) -> None:
    manifest = json.loads((bundles / "tiny/manifest.json").read_text("utf-8"))
    assert {name for name in files if name.startswith("bundle/")} == {
        "bundle/manifest.json",
        f"bundle/{manifest['tokenizer']['path']}",
        f"bundle/{manifest['graphs']['model']['path']}",
        "bundle/onnx/model.onnx_data",
    }


def test_onnxruntime_web_is_found_in_a_folder_above(
    bundles: Path, dist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    assert site(open_bundle(bundles / "tiny"))["ort/ort.wasm.min.mjs"] == dist / "ort.wasm.min.mjs"


def test_without_onnxruntime_web_the_error_says_how_to_get_it(
    bundles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GptEdgeError, match="run `npm install onnxruntime-web`"):
        site(open_bundle(bundles / "tiny"))
    with pytest.raises(GptEdgeError, match=r"lacks ort\.wasm\.min\.mjs"):
        site(open_bundle(bundles / "tiny"), tmp_path)


def test_a_written_folder_holds_the_same_files_and_nothing_else(files: Site, tmp_path: Path) -> None:
    write_site(files, str(tmp_path / "a/b"))
    written = {
        path.relative_to(tmp_path / "a/b").as_posix() for path in (tmp_path / "a/b").rglob("*") if path.is_file()
    }
    assert written == set(files)
    assert all((tmp_path / "a/b" / name).read_bytes() == path.read_bytes() for name, path in files.items())


def test_a_folder_that_holds_something_is_left_alone(files: Site, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("mine")
    with pytest.raises(GptEdgeError, match="not empty"):
        write_site(files, str(tmp_path / "full"))
    with pytest.raises(GptEdgeError, match="cannot write"):
        write_site(files, str(tmp_path / "full/mine"))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine"]


def test_a_taken_port_is_refused_in_one_line(server: Server, files: Site) -> None:
    with pytest.raises(GptEdgeError, match=f"port {server.server_port} cannot be used"):
        Server(files, server.server_port)


@pytest.mark.parametrize("host", ["[", "]", "[zz]"])
def test_a_host_that_is_no_address_is_refused(server: Server, host: str) -> None:
    assert ask(server, "/", host=host).status in (400, 403)


def test_a_reader_that_leaves_is_not_told_of(server: Server, capfd: pytest.CaptureFixture[str]) -> None:
    server.daemon_threads = False
    for _ in range(8):
        with socket.create_connection(("127.0.0.1", server.server_port)) as reader:
            reader.sendall(b"GET /nothing HTTP/1.1\r\nHost: localhost\r\n\r\nGET")
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closing resets
    assert ask(server, "/nothing").status == 404
    server.shutdown()
    server.server_close()  # joins the threads that answer
    assert capfd.readouterr().err == ""


def test_a_folder_that_cannot_be_filled_is_not_left_half(files: Site, tmp_path: Path) -> None:
    files["missing"] = tmp_path / "missing"
    with pytest.raises(GptEdgeError, match="missing"):
        write_site(files, str(tmp_path / "site"))
    assert not list((tmp_path / "site").iterdir())
