"""The windows of a batch, computed by Ray Data: each worker holds the bundle; a window whose worker dies is redone."""

import contextlib
import logging
import os
import pickle
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from .batch import Job
from .batch_files import Source
from .batch_rows import Answer, answer_window
from .errors import GptEdgeError, InputError
from .gpt import GPT

_CONNECT_S = 10


def answer_by_ray(
    job: Job, source: Source, first: int, *, address: str | None, workers: int | None
) -> Iterator[Answer]:
    """Compute on a Ray cluster, or on one that is started here: by ``workers``, else by as many as its CPUs allow.

    The threads of a worker are its CPUs, one where the job names none. Bundle and source stand at the same paths on
    every machine. Raises :class:`InputError`, and what a worker raised.
    """
    ray = _connect(address)
    threads = job.threads or 1
    size = workers or max(1, int(ray.cluster_resources()["CPU"]) // threads)
    job = replace(job, bundle=str(Path(job.bundle).resolve()), threads=threads)
    source = replace(source, path=source.path.resolve())
    windows = ray.data.from_items([first], override_num_blocks=1).flat_map(
        lambda item: _read_windows(source, item["item"]), num_cpus=0
    )
    answers = windows.map_batches(
        Worker,
        fn_constructor_args=(job, source.window_rows),
        batch_size=1,
        batch_format="numpy",
        num_cpus=threads,
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
    )
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints that a worker has died
            for row in answers.iter_rows():
                if row["failure"]:
                    raise pickle.loads(row["failure"])
                yield Answer(row["lines"].splitlines(keepends=True), int(row["tokens"]), int(row["errors"]))
    except ray.exceptions.RayError as error:
        raise InputError(f"Ray gave up ({type(error).__name__}): mend the cluster and run this again") from error
    finally:
        ray.shutdown()


class Worker:
    """Computes windows with a bundle of its own."""

    def __init__(self, job: Job, window_rows: int) -> None:
        self._job, self._window_rows = job, window_rows

    @cached_property
    def _gpt(self) -> GPT:
        return self._job.load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Answer a batch of one window, or tell why not: what is raised here comes along in other words of Ray's."""
        (number,), (lines,) = batch["number"], batch["lines"]
        first_line = int(number) * self._window_rows + 1
        answer, failure = Answer([], 0, 0), b""
        try:
            rows = lines.split(b"\n")
            answer = answer_window(self._gpt, rows, first_line, self._job.defaults, self._job.batch_size)
        except GptEdgeError as error:
            failure = pickle.dumps(error)
        columns = {"lines": b"".join(answer.lines), "tokens": answer.tokens, "errors": answer.errors}
        return {name: [value] for name, value in (columns | {"failure": failure}).items()}


def _read_windows(source: Source, first: int) -> Iterator[dict[str, Any]]:
    for number, window in enumerate(source.windows(first), first):
        yield {"number": number, "lines": b"\n".join(window)}


def _connect(address: str | None) -> Any:
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_BACKEND_LOG_LEVEL": "fatal"}
    if address is not None and ("RAY_AUTH_TOKEN" in os.environ or (Path.home() / ".ray/auth_token").exists()):
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # `ray start` does so; who then connects has to say it
    try:
        import ray.data
    except ImportError as error:
        raise InputError('--engine ray needs Ray: pip install "gptedge[ray]", or take --engine local') from error
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        if address is not None and ":" in address:  # Ray itself would try again for minutes
            host, _, port = address.rpartition(":")
            socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
        ray.init(address or "local", log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, ValueError, RuntimeError) as error:
        raise InputError(
            f"no Ray cluster answers at {address}: start one there, set RAY_AUTH_TOKEN if it asks for a token, "
            "or leave --ray-address out"
        ) from error
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    context.target_max_block_size = 1  # byte: each window is a block, which goes to the next free worker
    return ray
