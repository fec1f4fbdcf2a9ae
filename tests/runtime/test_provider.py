"""The device: asked means got, and what stands against CUDA is one line with its remedy.

What onnxruntime-gpu says is tested where it is installed; `make cuda-test` makes such a place, with or without a GPU.
"""

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime
import pytest
from gptedge_runtime import ProviderError, load
from gptedge_runtime.cuda import CUDA
from gptedge_runtime.provider import why_not_cuda

HAS_CUDA_BUILD = CUDA in onnxruntime.get_available_providers()
without_cuda_build = pytest.mark.skipif(HAS_CUDA_BUILD, reason="this onnxruntime has CUDA")
with_cuda_build = pytest.mark.skipif(not HAS_CUDA_BUILD, reason="onnxruntime-gpu is not installed here: make cuda-test")
without_gpu = pytest.mark.skipif(why_not_cuda() is None, reason="there is a GPU")


@pytest.fixture
def both_packages(tmp_path: Path) -> Path:
    """A folder for Python's path, by which whichever of the two packages is not installed is installed, too."""
    for package in ("onnxruntime", "onnxruntime-gpu"):
        try:
            version(package)
        except PackageNotFoundError:
            metadata = tmp_path / f"{package.replace('-', '_')}-1.0.dist-info/METADATA"
            metadata.parent.mkdir()
            metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n", "utf-8")
    return tmp_path


def generate(bundle: Path, *options: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    command = [sys.executable, "-m", "gptedge_runtime", "generate", str(bundle), "hello", "-n", "4", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("provider", ["CUDAExecutionProvider", "gpu", "CPU", ""])
def test_an_unknown_provider_is_refused(bundles: Path, provider: str) -> None:
    with pytest.raises(ProviderError, match="choose auto, cpu or cuda"):
        load(bundles / "tiny", provider=provider)


def test_cpu_is_cpu(bundles: Path) -> None:
    with load(bundles / "tiny", provider="cpu") as gpt:
        assert gpt.provider == "cpu"


@without_gpu
def test_auto_without_a_gpu_is_the_cpu(bundles: Path) -> None:
    with load(bundles / "tiny", provider="auto") as gpt:
        assert gpt.provider == "cpu"


@without_gpu
def test_cuda_without_a_gpu_is_an_error_and_never_a_quiet_cpu_run(
    bundles: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ProviderError, match=r"^provider cuda: .*(pip install|choose provider cpu)") as caught:
        load(bundles / "tiny", provider="cuda")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 290
    assert capfd.readouterr() == ("", "")


@without_gpu
def test_cuda_is_refused_before_the_bundle_is_read(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="provider cuda: "):
        load(tmp_path / "missing", provider="cuda")


@without_cuda_build
def test_a_build_without_cuda_names_the_package_that_has_it(bundles: Path) -> None:
    with pytest.raises(ProviderError, match=r'has no CUDA: pip uninstall .* pip install "gptedge\[cuda\]"'):
        load(bundles / "tiny", provider="cuda")


@without_cuda_build
def test_two_packages_of_one_module_are_explained(
    bundles: Path, both_packages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(both_packages))
    with pytest.raises(ProviderError, match=r"both installed, and the first hides the second: pip uninstall -y"):
        load(bundles / "tiny", provider="cuda")


@without_cuda_build
def test_auto_is_silent_where_nothing_could_use_a_gpu(bundles: Path) -> None:
    done = generate(bundles / "tiny")
    assert (done.returncode, done.stderr) == (0, "")


@without_cuda_build
def test_auto_tells_why_the_package_for_gpus_is_not_used(bundles: Path, both_packages: Path) -> None:
    done = generate(bundles / "tiny", path=both_packages)
    assert done.returncode == 0
    assert done.stderr.startswith("note: runs on cpu, not on cuda: onnxruntime and onnxruntime-gpu are both installed")
    assert done.stdout == generate(bundles / "tiny").stdout


@with_cuda_build
@without_gpu
def test_a_missing_library_or_driver_is_named(bundles: Path) -> None:
    with pytest.raises(
        ProviderError, match=r'lib\S+ of nvidia-\S+ is missing: pip install "gptedge\[cuda\]"|driver is missing|no GPU'
    ):
        load(bundles / "tiny", provider="cuda")


@with_cuda_build
@without_gpu
def test_auto_tells_in_one_line_which_device_it_took_and_why(bundles: Path) -> None:
    done = generate(bundles / "tiny")
    assert done.returncode == 0
    (line,) = done.stderr.splitlines()
    assert line.startswith("note: runs on cpu, not on cuda: ")


@with_cuda_build
@without_gpu
def test_a_device_that_was_named_is_not_told(bundles: Path) -> None:
    assert generate(bundles / "tiny", "--provider", "cpu").stderr == ""
