"""A page that runs a bundle in the browser: served to this computer only, or written to a folder for a web server."""

import os
import shutil
import sys
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from .bundle import MANIFEST, Bundle
from .errors import BundleError, InputError

Site = dict[str, Path]
"""Path on the server, relative to the page -> file. Nothing else is served."""

PAGE = Path(__file__).with_suffix("")
PAGE_FILES = ("index.html", "style.css", "page.js", "worker.js", "tokenizer.js")
ORT_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
ORT_DIST = "node_modules/onnxruntime-web/dist"

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".wasm": "application/wasm",
}
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",  # both together: only then may WebAssembly use threads
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def site(bundle: Bundle, ort: str | os.PathLike[str] | None = None) -> Site:
    """Return the page's files, the bundle's that it reads, and onnxruntime-web's.

    ``ort`` is onnxruntime-web's ``dist`` folder; None looks for it in ``node_modules`` here and above. Raises
    :class:`InputError` where it is not there and for a classifier, :class:`BundleError` where the bundle has no graph
    for it.
    """
    if bundle.classifier is not None:
        raise InputError(f"the bundle {bundle.folder} is a classifier, and the page writes text: use gptedge classify")
    if "model" not in bundle.graphs:
        raise BundleError(f"{MANIFEST} lists no graph 'model', which the page runs: export the bundle again")
    graph = bundle.graphs["model"].path
    dist = _find_ort(ort)
    return (
        {name: PAGE / name for name in PAGE_FILES}
        | {f"ort/{name}": dist / name for name in ORT_FILES}
        | {f"bundle/{name}": bundle.folder / name for name in (MANIFEST, bundle.tokenizer.path, graph, *bundle.weights)}
    )


def _find_ort(given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        folders = [Path(given)]
    else:
        here = Path.cwd()
        folders = [folder / ORT_DIST for folder in (here, *here.parents)]
    for folder in folders:
        if all((folder / name).is_file() for name in ORT_FILES):
            return folder.resolve()
    if given is not None:
        raise InputError(f"{given} lacks {', '.join(ORT_FILES)}: give the dist folder of npm's onnxruntime-web")
    raise InputError(f"no {ORT_DIST} here or above: run `npm install onnxruntime-web` or give its dist with --ort")


def write_site(files: Site, output: str) -> None:
    """Copy the site into a new or empty folder. Raises :class:`InputError` where that cannot be done."""
    folder = Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise InputError(f"{output} is not empty: give a new folder")
        try:
            for name, source in files.items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, folder / name)
        except BaseException:
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            raise
    except OSError as error:
        place = error.filename2 or error.filename
        raise InputError(f"cannot write {place} ({error.strerror}): give another folder") from error


class Server(ThreadingHTTPServer):
    """Answers GET for the site's files on 127.0.0.1; port 0 takes a free one. Raises :class:`InputError` if taken."""

    def __init__(self, files: Site, port: int) -> None:
        self.files = files
        try:
            super().__init__(("127.0.0.1", port), _Handler)
        except OSError as error:
            raise InputError(f"port {port} cannot be used ({error.strerror}): give another with --port") from error

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a reader who has left."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://127.0.0.1:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60  # seconds for a silent connection

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            name = urlsplit(self.path).path.removeprefix("/") or "index.html"
        except ValueError:  # "[" and no address behind it
            return self.send_error(HTTPStatus.BAD_REQUEST)
        if host not in ("127.0.0.1", "localhost"):  # a foreign name that was made to point here
            return self.send_error(HTTPStatus.FORBIDDEN)
        if name not in self.server.files:
            return self.send_error(HTTPStatus.NOT_FOUND)
        return self._send(self.server.files[name])

    def _send(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                self.send_response(HTTPStatus.OK)
                self.send_header("Content-Type", TYPES.get(path.suffix, "application/octet-stream"))
                self.send_header("Content-Length", str(os.fstat(file.fileno()).st_size))
                for name, value in HEADERS.items():
                    self.send_header(name, value)
                self.end_headers()
                shutil.copyfileobj(file, self.wfile)
        except OSError:  # the reader has left, or the file has gone: nothing more can be said on this connection
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: standard error is for what goes wrong."""
