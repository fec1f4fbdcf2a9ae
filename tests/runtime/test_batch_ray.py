"""``gptedge batch --engine ray``: the same bytes as without it, also when a worker dies."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from .test_batch import make_rows, write_rows
from .test_cli import COMMAND, gptedge, refused

pytest.importorskip("ray", reason='Ray is not installed: pip install "gptedge[ray]"')

ROWS = make_rows(400)


@pytest.fixture(scope="module")
def expected(bundles: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file of rows, and what they give without Ray."""
    folder = tmp_path_factory.mktemp("local")
    source, target = write_rows(folder / "in.jsonl", ROWS), folder / "out.jsonl"
    assert gptedge("batch", bundles / "tiny", source, target, "-n", 40, "--batch-size", 2).returncode == 0
    return source, target.read_bytes()


def workers_of(driver: int) -> list[int]:
    """The processes that compute for a driver: children of the raylet that is its child."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
    mine = [pid for pid, name in names.items() if name.startswith(b"ray::MapWorker")]
    return [pid for pid in mine if parents.get(parents.get(pid, 0)) == driver]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="workers are found in /proc")
def test_the_death_of_a_worker_changes_no_byte(bundles: Path, expected: tuple[Path, bytes], tmp_path: Path) -> None:
    source, answers = expected
    target = tmp_path / "out.jsonl"
    workers: list[int] = []
    killed = False
    command = ["batch", str(bundles / "tiny"), str(source), str(target), "-n", "40", "--batch-size", "2"]
    with subprocess.Popen([*COMMAND, *command, "--engine", "ray"], stdout=subprocess.PIPE) as running:
        while running.poll() is None and not killed:
            workers = workers or workers_of(running.pid)  # sought while there is time: a busy machine is slow to look
            if workers and target.exists() and target.stat().st_size:  # some windows are there, others being computed
                os.kill(workers[0], signal.SIGKILL)
                killed = True
            time.sleep(0.001 if workers else 0.05)
        stdout, _ = running.communicate()
    assert killed
    assert (running.returncode, stdout) == (0, b"")
    assert target.read_bytes() == answers


def test_a_run_goes_on_with_ray_where_it_was_cut_off_without(
    bundles: Path, expected: tuple[Path, bytes], tmp_path: Path
) -> None:
    source, answers = expected
    command = ["batch", bundles / "tiny", source, tmp_path / "out.jsonl", "-n", 40, "--batch-size", 2]
    assert gptedge(*command).returncode == 0
    (tmp_path / "out.jsonl").write_bytes(answers[: len(answers) // 2])
    done = gptedge(*command, "--engine", "ray", "--workers", 1)
    assert (done.returncode, done.stdout) == (0, b"")
    assert (tmp_path / "out.jsonl").read_bytes() == answers


REPLACED = """
import sys
from dataclasses import replace
from gptedge_runtime import InputError
from gptedge_runtime.batch import Job, run_batch
from gptedge_runtime.batch_ray import answer_by_ray
from gptedge_runtime.batch_rows import Defaults

def late(job, source, first):
    return answer_by_ray(replace(job, bundle_sha256="another's"), source, first, address=None, workers=1)

try:
    run_batch(Job(sys.argv[1], Defaults()), sys.argv[2], sys.argv[3], engine=late)
except InputError as error:
    print(error)
"""


def test_what_a_worker_raises_is_raised(bundles: Path, expected: tuple[Path, bytes], tmp_path: Path) -> None:
    """Here that it found another bundle than the run began with."""
    arguments = [bundles / "tiny", expected[0], tmp_path / "out.jsonl"]
    done = subprocess.run([sys.executable, "-c", REPLACED, *arguments], capture_output=True, text=True, check=False)
    assert "was replaced since this run began: give another OUT\n" in done.stdout


def test_a_cluster_that_does_not_answer_is_one_line(
    bundles: Path, expected: tuple[Path, bytes], tmp_path: Path
) -> None:
    command = ["batch", bundles / "tiny", expected[0], tmp_path / "out.jsonl", "--engine", "ray"]
    assert "no Ray cluster answers at 127.0.0.1:1" in refused(gptedge(*command, "--ray-address", "127.0.0.1:1"))


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster that runs already, with two CPUs."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    options = ["--head", "--block", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    options += ["--object-store-memory=100000000", "--disable-usage-stats"]
    program = str(Path(sys.executable).with_name("ray"))
    with tempfile.TemporaryDirectory() as folder:  # a short path, since sockets lie in it
        command = [program, "start", *options, f"--temp-dir={folder}"]
        silent = subprocess.DEVNULL
        with subprocess.Popen(command, stdout=silent, stderr=silent, start_new_session=True) as running:
            try:
                yield f"127.0.0.1:{port}"
            finally:
                os.killpg(running.pid, signal.SIGKILL)  # to end by itself takes it half a minute


def test_a_running_cluster_gives_the_same_bytes(
    bundles: Path, expected: tuple[Path, bytes], tmp_path: Path, cluster: str
) -> None:
    source, answers = expected
    command = ["batch", bundles / "tiny", source, tmp_path / "out.jsonl", "-n", 40, "--batch-size", 2]
    command += ["--engine", "ray", "--ray-address", cluster]
    for _ in range(60):  # until it has started
        done = gptedge(*command)
        if b"no Ray cluster answers" not in done.stderr:
            break
        time.sleep(1)
    assert (done.returncode, done.stdout) == (0, b"")
    assert (tmp_path / "out.jsonl").read_bytes() == answers
