"""No network, no telemetry, nothing written, nothing told: what a program that embeds the runtime may rely on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ..commands import run

SECRETS = ("sEcRetUser", "sEcRetHome", "sEcRetFolder")

USE = """
import sys
events = []
sys.addaudithook(lambda event, args: events.append((event, args)))
from gptedge_runtime import load
from gptedge_runtime.verify import verify
with load(sys.argv[1]) as gpt:
    gpt.generate("hello", max_new_tokens=5)
verify(sys.argv[1])
"""


def test_python_opens_no_socket_and_writes_no_file(bundles: Path, tmp_path: Path) -> None:
    """By Python's own record of what it does, which no import escapes."""
    code = USE + (
        "for event, args in events:\n"
        "    network = event.startswith(('socket.', 'urllib.', 'http.', 'ftplib.', 'smtplib.'))\n"
        "    writes = event == 'open' and isinstance(args[1], str) and set(args[1]) & set('wax+')\n"
        "    if network or writes or event in ('os.mkdir', 'os.remove', 'os.rename', 'subprocess.Popen'):\n"
        "        print(event, args)\n"
    )
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, bundles / "tiny"], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_the_process_opens_no_socket_and_writes_no_file(bundles: Path, tmp_path: Path) -> None:
    """By the kernel's record, which holds for C++ too."""
    home = tmp_path / "home"
    home.mkdir()
    calls = "trace=socket,connect,bind,sendto,sendmsg,openat,open,creat,mkdir,mkdirat,rename,renameat2,unlink"
    done = subprocess.run(
        ["strace", "-f", "-qq", "-o", tmp_path / "log", "-e", calls, sys.executable, "-B", "-c", USE, bundles / "tiny"],
        capture_output=True,
        text=True,
        check=False,
        cwd=home,
        env=os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")},
    )
    if "ptrace" in done.stderr:
        pytest.skip("strace may not trace here")
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "log").read_text().splitlines()
    assert any("onnx/model.onnx_data" in line for line in lines), "the record holds what was read"
    writing = ("O_WRONLY", "O_RDWR", "O_CREAT", "mkdir", "rename", "unlink", "creat(")
    network = ("socket(", "connect(", "bind(", "sendto(", "sendmsg(")
    harmless = ("/dev/null", "/dev/shm", "/sys/", "/proc/")
    told = [line for line in lines if any(sign in line for sign in (*writing, *network))]
    assert [line for line in told if not any(path in line for path in harmless) and "AF_UNIX" not in line] == []
    assert list(home.iterdir()) == []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle written under names that nobody should read in it."""
    folder = tmp_path_factory.mktemp(SECRETS[2])
    home = folder / SECRETS[1]
    home.mkdir()
    (folder / "config.json").write_text(
        '{"vocab_size": 257, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 1}'
    )
    environment = {"HOME": str(home), "USER": SECRETS[0], "LOGNAME": SECRETS[0], "HOSTNAME": SECRETS[0]}
    arguments = ["random", "--config", "config.json", "--tokenizer", "bytes", "-o", "bundle", "-q"]
    program = Path(sys.executable).parent / "export-onnx"
    subprocess.run([program, *arguments], check=True, cwd=folder, env=os.environ | environment)
    return folder / "bundle"


def test_a_bundles_bytes_tell_no_path_and_no_name(exported: Path) -> None:
    places = (*SECRETS, str(exported.parent), sys.prefix, str(Path(__file__).parents[2]), "site-packages", ".py")
    for path in sorted(path for path in exported.rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert [place for place in places if place.encode() in data] == [], path.name


def test_an_export_leaves_nothing_beside_the_bundle(exported: Path) -> None:
    assert sorted(path.name for path in exported.parent.iterdir()) == ["bundle", "config.json", SECRETS[1]]
    assert run("gptedge", "verify", exported).returncode == 0
