"""Bundles for the tests: from the folder GPTEDGE_TEST_BUNDLES, else written now, which needs PyTorch."""

import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptedge_runtime import GPT, load
from gptedge_runtime.provider import why_not_cuda
from numpy.typing import NDArray

from .signing import sign

Manifest = dict[str, Any]
Edit = Callable[[Manifest], object]

# A shell starts what it puts in the background deaf to Ctrl-C, and every child inherits that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@functools.cache
def no_gpu() -> str | None:
    return why_not_cuda()


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and (reason := no_gpu()):
        pytest.skip(f"not run on a GPU: {reason}")


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if given := os.environ.get("GPTEDGE_TEST_BUNDLES"):
        return Path(given)
    folder = tmp_path_factory.mktemp("bundles")
    subprocess.run([sys.executable, Path(__file__).with_name("make_bundles.py"), folder], check=True)
    return folder


@pytest.fixture(scope="session")
def tiny(bundles: Path) -> Iterator[GPT]:
    """A random model with a context of 32 tokens."""
    with load(bundles / "tiny") as gpt:
        yield gpt


@pytest.fixture(scope="session")
def answers(bundles: Path) -> Callable[[str], "Eager"]:
    return lambda name: Eager(bundles / f"{name}.npz")


@pytest.fixture(scope="session")
def eager(answers: Callable[[str], "Eager"]) -> "Eager":
    """Of the model ``tiny``."""
    return answers("tiny")


class Eager:
    """What the eager model answered: greedy ids of prompts up to, at and beyond the context, and logits."""

    def __init__(self, path: Path) -> None:
        arrays: dict[str, NDArray[Any]] = dict(np.load(path))
        count = sum(name.startswith("prompt_") for name in arrays)
        self.prompts: list[list[int]] = [arrays[f"prompt_{i}"].tolist() for i in range(count)]
        self.new: list[list[int]] = [arrays[f"new_{i}"].tolist() for i in range(count)]
        self.ids, self.logits, self.last_logits = arrays["ids"], arrays["logits"], arrays["last_logits"]
        # two sound float32 programs add in different orders and differ by up to 1.1e-5 of the largest logit
        self.atol = max(1e-5, 2e-5 * float(np.abs(self.logits).max()))


@pytest.fixture
def bundle(bundles: Path, tmp_path: Path) -> Path:
    """A copy of the tiny bundle to damage."""
    return shutil.copytree(bundles / "tiny", tmp_path / "bundle")


@pytest.fixture
def edit(bundle: Path) -> Callable[[Edit], Path]:
    """Change the copy's manifest, with hashes that are right again."""
    return functools.partial(sign, bundle)
