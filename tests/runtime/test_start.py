"""How the commands start: while their modules are loaded nothing ends in a traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from .test_cli import INSTALLED, refused

pytestmark = pytest.mark.skipif(not INSTALLED.exists(), reason="the command is not installed")

START = "import sys, gptedge_start; sys.modules[{missing!r}] = None; gptedge_start.{command}()"
INTERRUPT = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"


def environment(folder: Path, module: str, code: str) -> dict[str, str]:
    """In which this code is what is imported by that name."""
    (folder / f"{module}.py").write_text(code)
    return os.environ | {"PYTHONPATH": str(folder)}


def generate(bundle: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([INSTALLED, "generate", bundle, "hello"], capture_output=True, env=variables, check=False)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_ctrl_c_ends_a_command_that_is_loading_by_its_signal(bundles: Path, tmp_path: Path) -> None:
    done = generate(bundles / "tiny", environment(tmp_path, "click", INTERRUPT))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


def test_ctrl_c_while_onnxruntime_is_loading_is_no_fault_of_its(bundles: Path, tmp_path: Path) -> None:
    """This is what its library makes of a Ctrl-C."""
    code = "raise ImportError('initialization failed') from KeyboardInterrupt()"
    done = generate(bundles / "tiny", environment(tmp_path, "onnxruntime", code))
    assert refused(done, 130) == "error: interrupted"


@pytest.mark.parametrize(
    ("command", "missing", "remedy"),
    [
        ("gptedge", "tiktoken", "gptedge[cpu]"),
        ("export_onnx", "onnx_ir", "gptedge[cpu,export]"),
        ("export_hf", "onnx_ir", "gptedge[cpu,export]"),
    ],
)
def test_a_missing_package_is_one_line_that_names_the_remedy(command: str, missing: str, remedy: str) -> None:
    code = START.format(command=command, missing=missing)
    line = refused(subprocess.run([sys.executable, "-c", code], capture_output=True, check=False))
    assert line == f'error: {missing} is not installed: pip install "{remedy}"'
