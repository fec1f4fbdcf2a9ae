"""Bundles with the graph for CUDA: from the folder GPTEDGE_TEST_BUNDLES, else written now, which needs PyTorch."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gptedge_runtime import GPT
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.cuda import CudaSession
from gptedge_runtime.tokenizer import load_tokenizer

OpenOn = Callable[[str, str], GPT]


@pytest.fixture(scope="session")
def cuda_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds ``fp32``, ``fp16`` and ``bf16``, all of the model ``tiny``."""
    given = os.environ.get("GPTEDGE_TEST_BUNDLES")
    if given and Path(given, "cuda").is_dir():
        return Path(given, "cuda")
    folder = tmp_path_factory.mktemp("cuda")
    subprocess.run([sys.executable, Path(__file__).parents[1] / "make_bundles.py", folder, "--cuda"], check=True)
    return folder


@pytest.fixture(scope="session")
def open_on(cuda_bundles: Path) -> Iterator[OpenOn]:
    """Open the bundle of a precision on a device, once."""
    opened: dict[tuple[str, str], GPT] = {}

    def open_one(precision: str, device: str) -> GPT:
        if (precision, device) not in opened:
            bundle = open_bundle(cuda_bundles / precision)
            session = CudaSession(bundle, threads=1, device=device)
            opened[precision, device] = GPT(load_tokenizer(bundle), session)
        return opened[precision, device]

    yield open_one
    for gpt in opened.values():
        gpt.close()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The CPU runs the same graph by the same code; only a GPU shows what its kernels make of it."""
    name: str = request.param
    return name
