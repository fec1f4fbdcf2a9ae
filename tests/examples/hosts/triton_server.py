"""Triton as a host: a task in JSON on stdin, ids and the number of runs in JSON on stdout.

The server, its reading of config.pbtxt and its batches are real. PyPI carries it with the Python backend only, so that
triton_model.py stands in for the ONNX Runtime backend.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytriton  # type: ignore[import-not-found,unused-ignore]

TRITON = Path(pytriton.__file__).parent / "tritonserver"
START_S = 120

task = json.load(sys.stdin)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def call(path: str, body: Any = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/{path}", data) as response:
        return json.loads(response.read() or "null")


def ask(rows: list[list[int]], counts: list[int]) -> list[list[int]]:
    """One request of one or more rows of one length."""
    values = {"prompt_ids": rows, "max_new_ids": [[count] for count in counts]}
    inputs = [
        {"name": name, "shape": [len(value), len(value[0])], "datatype": "INT64", "data": value}
        for name, value in values.items()
    ]
    (new_ids,) = call("models/gptedge/infer", {"inputs": inputs})["outputs"]
    n_rows, width = new_ids["shape"]
    return [new_ids["data"][row * width : (row + 1) * width] for row in range(n_rows)]


def count_runs() -> int:
    (model,) = call("models/gptedge/stats")["model_stats"]
    count: int = model["execution_count"]
    return count


def answer(encoded: list[list[int]], count: int) -> dict[str, Any]:
    single = [ask([ids], [count])[0] for ids in encoded]
    before = count_runs()
    with ThreadPoolExecutor(len(encoded)) as pool:  # at the same time, so that Triton puts them together
        batch = list(pool.map(lambda ids: ask([ids], [count])[0], encoded))
    runs = count_runs() - before
    return {"single": single, "batch": batch, "runs": runs, "rows": ask([encoded[0]] * 3, [2, count, 0])}


with tempfile.TemporaryDirectory() as folder:
    repository = Path(folder) / "repository"
    shutil.copytree(task["repository"], repository)
    config = repository / "gptedge/config.pbtxt"
    text = config.read_text("utf-8").replace('backend: "onnxruntime"', 'backend: "python"')
    config.write_text(text.replace("microseconds: 5000", "microseconds: 100000"))  # this machine may be slow
    shutil.copyfile(Path(__file__).with_name("triton_model.py"), repository / "gptedge/1/model.py")
    port = free_port()
    options = [f"--model-repository={repository}", f"--backend-directory={TRITON / 'backends'}"]
    options += ["--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",  # its Python backend is this environment
        "LD_LIBRARY_PATH": sysconfig.get_config_var("LIBDIR"),
    }
    with subprocess.Popen([TRITON / "bin/tritonserver", *options], stdout=sys.stderr, env=environment) as server:
        try:
            end = time.monotonic() + START_S
            while server.poll() is None and time.monotonic() < end:
                try:
                    call("health/ready")
                    break
                except OSError:
                    time.sleep(0.1)
            print(json.dumps(answer(task["encoded"], task["max_new_tokens"])))
        finally:
            server.terminate()
