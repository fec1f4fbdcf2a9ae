"""One model at each precision, many hosts: text to ids, greedy ids of single prompts and of a ragged batch."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from gptedge_runtime import load
from gptedge_runtime.bundle import PRECISIONS, open_bundle
from gptedge_runtime.web import site

from .conftest import HERE, NEW_TOKENS, ROOT, MakeTask, Need, Task, run_host, serving, write_in_page

Answer = dict[str, list[list[int]]]


def python_runtime(task: Task, request: pytest.FixtureRequest) -> Answer:
    with load(task.bundle) as gpt:
        encoded = [gpt.tokenizer.encode(text) for text in task.prompts]
        single = [gpt.generate_ids(ids, max_new_tokens=NEW_TOKENS) for ids in encoded]
        return {"encoded": encoded, "single": single, "batch": gpt.generate_ids(encoded, max_new_tokens=NEW_TOKENS)}


def node_example(task: Task, request: pytest.FixtureRequest) -> Answer:
    need: Need = request.getfixturevalue("need")
    need("the Node example's node_modules", ROOT / "examples/node/node_modules/onnxruntime-node")
    return run_host(request.getfixturevalue("node"), "hosts/node_example.mjs", task.to_json())


def browser(task: Task, request: pytest.FixtureRequest) -> Answer:
    """The page, with one file more: it does not use generate.onnx itself."""
    page = request.getfixturevalue("page")
    files = site(open_bundle(task.bundle), request.getfixturevalue("ort_dist"))
    with serving(files | {"bundle/onnx/generate.onnx": task.bundle / "onnx/generate.onnx"}) as url:
        page.goto(url)
        single = [write_in_page(page, prompt, NEW_TOKENS) for prompt in task.prompts]
        answer: Answer = page.evaluate((HERE / "browser.js").read_text("utf-8"), json.loads(task.to_json()))
    return answer | {"single": single}


def transformers_js(task: Task, request: pytest.FixtureRequest) -> Answer:
    need: Need = request.getfixturevalue("need")
    need("@huggingface/transformers", HERE / "node_modules/@huggingface/transformers")
    return run_host(request.getfixturevalue("node"), "hosts/transformers_js.mjs", task.to_json())


def genai(task: Task, request: pytest.FixtureRequest) -> Answer:
    return run_host(_peers(request), "hosts/genai.py", task.to_json())


def optimum(task: Task, request: pytest.FixtureRequest) -> Answer:
    return run_host(_peers(request), "hosts/optimum_ort.py", task.to_json())


def c_example(task: Task, request: pytest.FixtureRequest) -> Answer:
    """It takes ids, one prompt at a time: tiktoken encodes for it, and rows stand for the batch."""
    need: Need = request.getfixturevalue("need")
    need("onnxruntime_c_api.h", ROOT / "examples/c/build/headers", "/usr/include/onnxruntime/onnxruntime_c_api.h")
    need("make", shutil.which("make"))
    need("a C compiler", shutil.which("cc"))
    subprocess.run(["make", "-C", ROOT / "examples/c", f"PYTHON={sys.executable}"], check=True)
    program = ROOT / "examples/c/build/generate"
    single = []
    for ids in task.encoded:
        arguments = map(str, [task.bundle, -1, NEW_TOKENS, *ids])
        done = subprocess.run([program, *arguments], capture_output=True, encoding="utf-8", check=True)
        single.append([int(line) for line in done.stdout.split()])
    return {"encoded": task.encoded, "single": single, "batch": single}


def _peers(request: pytest.FixtureRequest) -> Path:
    need: Need = request.getfixturevalue("need")
    return need("build/peers-venv with genai and optimum", ROOT / "build/peers-venv/bin/python")


HOSTS: list[Callable[[Task, pytest.FixtureRequest], Answer]] = [
    python_runtime,
    node_example,
    browser,
    genai,
    transformers_js,
    optimum,
    c_example,
]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.__name__)
def test_every_host_gives_the_ids_of_tiktoken_and_of_the_eager_model(
    make_task: MakeTask,
    request: pytest.FixtureRequest,
    host: Callable[[Task, pytest.FixtureRequest], Answer],
    precision: str,
) -> None:
    task = make_task(precision)
    answer = host(task, request)
    assert answer["encoded"] == task.encoded
    assert answer["single"] == task.new_ids
    assert answer["batch"] == task.new_ids
