import json
import subprocess
import sys
from pathlib import Path

import pytest
from gptedge_models import GPTConfig

from ..commands import run

TINY = GPTConfig(vocab_size=300, context_length=16, emb_dim=16, n_heads=2, n_layers=1)


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.json"
    path.write_text(json.dumps(TINY.to_dict()))
    return path


def test_a_report_in_json_is_all_of_stdout(config_file: Path, tmp_path: Path) -> None:
    source = ("random", "--config", config_file, "--tokenizer", "bytes")
    result = run("export-onnx", *source, "-o", tmp_path / "bundle", "--json")
    report = json.loads(result.stdout)
    assert (result.returncode, result.stderr) == (0, "")
    assert report["worst"]["max_abs_diff"] <= report["worst"]["bound"]
    assert report["top1_agreement"] == 1.0
    assert report["size_bytes"] == sum(
        path.stat().st_size for path in (tmp_path / "bundle").rglob("*") if path.is_file()
    )


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        ([], "SOURCE"),
        (["demo"], "output"),
        (["no/such/file.pth", "-o", "{tmp}/b"], "no/such/file.pth"),
        (["random", "-o", "{tmp}/b"], "--config"),
        (["random", "--config", "gpt9", "-o", "{tmp}/b"], "gpt9"),
        (["random", "--config", "{config}", "-o", "{tmp}/b"], "--tokenizer"),
        (["random", "--config", "{config}", "--tokenizer", "nothing", "-o", "{tmp}/b"], "nothing"),
        (["random", "--config", "{config}", "--tokenizer", "bytes", "--opset", "7", "-o", "{tmp}/b"], "opset 7"),
        (["random", "--config", "{config}", "--tokenizer", "bytes", "-o", "{config}"], "no folder"),
        (["random", "--config", "{config}", "--tokenizer", "bytes", "--precision", "int2", "-o", "{tmp}/b"], "int2"),
        (["random", "--config", "{config}", "--seed", "-1", "-o", "{tmp}/b"], "-1"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    args: list[str], cause: str, config_file: Path, tmp_path: Path
) -> None:
    result = run("export-onnx", *[arg.format(tmp=tmp_path, config=config_file) for arg in args])
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stderr.rstrip("\n")) <= 300
    assert cause in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_telemetry_is_off_before_onnxruntime_is_imported() -> None:
    code = "import gptedge_export, os, sys; print('onnxruntime' in sys.modules, os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False 1\n", "")
