"""The program examples/node/generate.mjs, as a user starts it."""

import os
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
