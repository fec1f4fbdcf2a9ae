"""The Triton example: a model repository whose graph takes the batches that Triton makes."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from .conftest import NEW_TOKENS, ROOT, Need, Task, run_host


def write_repository(bundle: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(sys, "argv", ["make_repository.py", str(bundle), str(repository)])
    runpy.run_path(str(ROOT / "examples/triton/make_repository.py"), run_name="__main__")
    return repository


@pytest.fixture(scope="module")
def repository(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as monkeypatch:
        return write_repository(task.bundle, tmp_path_factory.mktemp("triton") / "repository", monkeypatch)


@pytest.fixture(scope="module")
def served(task: Task, repository: Path, need: Need) -> dict[str, Any]:
    """What the server answered."""
    python = need("build/triton-venv with Triton's server", ROOT / "build/triton-venv/bin/python")
    return run_host(python, "hosts/triton_server.py", task.to_json(repository=str(repository), encoded=task.encoded))


def run(repository: Path, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """One batch, put together as Triton's ONNX Runtime backend does it for this config.pbtxt."""
    feeds = {
        "prompt_ids": np.concatenate([np.array(prompt) for prompt in prompts]),
        "prompt_lengths": np.array([len(prompt) for prompt in prompts], np.int32),
        "max_new_ids": np.array(counts)[:, None],
    }
    session = ort.InferenceSession(repository / "gptedge/1/model.onnx")
    (rows,) = session.run(["new_ids"], feeds)
    assert {value.name for value in session.get_inputs()} == feeds.keys()
    answer: list[list[int]] = rows.tolist()
    return answer


def test_a_ragged_batch_gives_each_prompt_the_ids_of_the_eager_model(task: Task, repository: Path) -> None:
    assert run(repository, task.encoded, [NEW_TOKENS] * len(task.encoded)) == task.new_ids


def test_a_row_that_asked_for_less_than_the_longest_is_filled_with_minus_one(task: Task, repository: Path) -> None:
    counts = [3, 0, NEW_TOKENS, 1, 2, 5]
    expected = [ids[:n] + [-1] * (NEW_TOKENS - n) for ids, n in zip(task.new_ids, counts, strict=True)]
    assert run(repository, task.encoded, counts) == expected


def test_prompts_longer_than_the_context_slide_as_alone(
    bundles: Path, answers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = answers("tiny")
    repository = write_repository(bundles / "tiny", tmp_path / "repository", monkeypatch)
    eos = json.loads((bundles / "tiny/manifest.json").read_text("utf-8"))["tokenizer"]["eos_token_id"]
    assert not any(eos in ids for ids in eager.new)
    assert run(repository, eager.prompts, [72] * len(eager.prompts)) == eager.new


def test_the_server_gives_single_requests_the_ids_of_the_eager_model(task: Task, served: dict[str, Any]) -> None:
    assert served["single"] == task.new_ids


def test_the_server_batches_requests_of_any_lengths_and_the_ids_stay(task: Task, served: dict[str, Any]) -> None:
    assert served["batch"] == task.new_ids
    assert served["runs"] < len(task.encoded)


def test_the_server_takes_requests_of_several_rows(task: Task, served: dict[str, Any]) -> None:
    ids = task.new_ids[0]
    assert served["rows"] == [ids[:2] + [-1] * (NEW_TOKENS - 2), ids, [-1] * NEW_TOKENS]
