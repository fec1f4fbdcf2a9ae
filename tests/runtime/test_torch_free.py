"""The runtime needs neither PyTorch nor our other packages, and onnxruntime gets no say about its own options."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise {error}(name + " is blocked")
sys.meta_path.insert(0, Block())
"""
OTHERS = [
    "torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "huggingface_hub", "transformers", "tokenizers",
    "gptedge_models", "gptedge_export",
]  # fmt: skip
IMPORT_ALL = """
import importlib, pkgutil, gptedge_runtime
names = [m.name for m in pkgutil.iter_modules(gptedge_runtime.__path__) if m.name != "__main__"]
for name in names:
    importlib.import_module("gptedge_runtime." + name)
assert len(names) >= 8, names
"""


def python(code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_every_module_imports_and_generates_without_pytorch(bundles: Path) -> None:
    code = BLOCK.format(blocked=OTHERS, error="ModuleNotFoundError") + IMPORT_ALL
    code += "print(len(gptedge_runtime.load(sys.argv[1]).generate_ids([1, 2])))"
    done = python(code, bundles / "tiny")
    assert (done.stdout, done.stderr) == ("128\n", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("ModuleNotFoundError", 'onnxruntime is not installed: pip install "gptedge[cpu]"'),
        ("ImportError", "onnxruntime does not load: python -c 'import onnxruntime' says why"),
    ],
)
def test_modules_import_without_onnxruntime_and_load_names_the_remedy(bundles: Path, error: str, line: str) -> None:
    code = (
        BLOCK.format(blocked=["onnxruntime"], error=error)
        + IMPORT_ALL
        + ("try: gptedge_runtime.load(sys.argv[1])\nexcept gptedge_runtime.ProviderError as error: print(error)")
    )
    done = python(code, bundles / "tiny")
    assert (done.stdout, done.stderr) == (f"{line}\n", "")


def test_telemetry_is_off_and_a_model_brings_no_options_of_its_own(bundles: Path) -> None:
    code = (
        "import os, sys, gptedge_runtime\n"
        "gptedge_runtime.load(sys.argv[1])\n"
        "print(os.environ['ORT_DISABLE_TELEMETRY'], 'ORT_LOAD_CONFIG_FROM_MODEL' in os.environ)"
    )
    done = python(code, bundles / "tiny", ORT_LOAD_CONFIG_FROM_MODEL="1", ORT_DISABLE_TELEMETRY="0")
    assert (done.stdout, done.stderr) == ("1 False\n", "")


def test_importing_the_package_does_not_import_onnxruntime() -> None:
    done = python("import sys, gptedge_runtime; print('onnxruntime' in sys.modules)")
    assert done.stdout == "False\n"
