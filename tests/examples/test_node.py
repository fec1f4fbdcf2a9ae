"""The program examples/node/generate.mjs, as a user starts it."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from gptedge_runtime import load

from .conftest import PROMPTS, ROOT, Need, Task

PROGRAM = ROOT / "examples/node/generate.mjs"


@pytest.mark.parametrize("flags", [[], ["--one-call"]], ids=["stream", "one call"])
@pytest.mark.parametrize("prompt", [PROMPTS["emoji"], PROMPTS["cjk"]], ids=["emoji", "cjk"])
def test_it_prints_the_runtimes_text_and_leaves_nothing_at_home(
    task: Task, node: Path, need: Need, tmp_path: Path, prompt: str, flags: list[str]
) -> None:
    need("the Node example's node_modules", ROOT / "examples/node/node_modules/onnxruntime-node")
    done = subprocess.run(
        [node, PROGRAM, task.bundle, prompt, "60", *flags],  # beyond the context: the oldest tokens fall out
        capture_output=True,
        encoding="utf-8",
        env=os.environ | {"HOME": str(tmp_path)},
        check=True,
    )
    with load(task.bundle) as gpt:
        assert done.stdout == gpt.generate(prompt, max_new_tokens=60) + "\n"
    assert list(tmp_path.iterdir()) == []  # onnxruntime's telemetry would write there


def test_a_damaged_bundle_is_refused(task: Task, node: Path, need: Need, tmp_path: Path) -> None:
    need("the Node example's node_modules", ROOT / "examples/node/node_modules/onnxruntime-node")
    bundle = shutil.copytree(task.bundle, tmp_path / "bundle")
    ranks = bundle / "tokenizer.tiktoken"
    ranks.write_bytes(ranks.read_bytes()[:9000])
    done = subprocess.run([node, PROGRAM, bundle, "a", "1"], capture_output=True, encoding="utf-8", check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "tokenizer.tiktoken is not the file that was exported: copy it again\n"


def test_a_reader_that_leaves_is_no_error(task: Task, node: Path, need: Need) -> None:
    need("the Node example's node_modules", ROOT / "examples/node/node_modules/onnxruntime-node")
    program = subprocess.Popen([node, PROGRAM, task.bundle, "a", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert program.stdout is not None
    program.stdout.close()
    assert (program.wait(), program.stderr and program.stderr.read()) == (0, b"")
