import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gptedge_models import CheckpointError, GPTConfig, GPTModel, load_checkpoint

TINY = GPTConfig(vocab_size=65, context_length=16, emb_dim=24, n_heads=4, n_layers=2, drop_rate=0.5, qkv_bias=True)
PEAK = """
import sys
from gptedge_models import load_checkpoint
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
load_checkpoint(sys.argv[1], config={"n_heads": 4})  # imports what a load imports
before = kib("VmRSS")
model = load_checkpoint(sys.argv[2], config={"n_heads": 4})
print(kib("VmHWM") - before)
"""


@pytest.fixture(scope="session")
def tiny() -> GPTConfig:
    return TINY


@pytest.fixture
def model(tiny: GPTConfig) -> GPTModel:
    return load_checkpoint("random", config=tiny)


@pytest.fixture
def ids(tiny: GPTConfig) -> torch.Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(tiny.vocab_size, (2, tiny.context_length), generator=generator)


@pytest.fixture(scope="session")
def refusal() -> Callable[..., CheckpointError]:
    """Return the error of a load, which must be one line of at most 300 characters in our own words."""

    def load(source: str | Path, **options: Any) -> CheckpointError:
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(source, **options)
        line = str(caught.value)
        assert len(line) <= 300
        assert line.isprintable()
        assert not any(word in line for word in ("weights_only", "Traceback", ".cc", ".cpp", "Error:"))
        return caught.value

    return load


@pytest.fixture
def peak_kib(model: GPTModel, tmp_path: Path) -> Callable[[Path], int]:
    """Return by how much a load raises the peak of a fresh process, in KiB; the checkpoint has 4 heads."""
    torch.save(model.state_dict(), tmp_path / "first.pth")

    def measure(source: Path) -> int:
        command = [sys.executable, "-c", PEAK, str(tmp_path / "first.pth"), str(source)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return measure
