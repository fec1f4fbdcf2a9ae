"""gptedge and its peers at one model, on this machine: peers.py WORK --output FOLDER [--rounds 3] [--only NAME ...].

The model has the sizes of GPT-2 124M with an output head of its own, and random weights of a fixed seed; WORK keeps it
in each tool's own form (about 6 GB) for the next run. A round loads the tools of the same bits, each in a process of
its own (float32: 9 GB of memory in all), and measures them in turns: a tool works for a second or so, all others are
stopped meanwhile, so that a machine whose speed varies is the same for all of them. Nothing is installed:
``pip install "gptedge[export,peers]"`` brings the peers, and one that cannot run is listed with its reason.
FOLDER gets peers.md, peers.svg and peers.json, anew after each round.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any

from peer_models import (
    CHECKS,
    LOOP,
    NEW_TOKENS,
    REPETITIVE,
    STEPS,
    TEXTBOOK_STEPS,
    TIMED_STEPS,
    random_ids,
    write_model,
)
from peer_report import TEXTBOOK, TIMED, Results, write_report
from peer_tools import PEERS, Peer

MAX_S = 3600  # of one answer; an export at int4 takes minutes
TURNS = 3  # of a round
WARM_S = 6.0  # after loading: what a tool does in the background, as gptedge moves its weights, is over then


def serve(name: str, precision: str, work: Path, threads: int, spawned: float) -> None:
    """Load one peer and tell of that; then answer each line of stdin, the name of a figure, by its value."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what tools print is not an answer
    started = time.perf_counter()
    peer = PEERS[name](work, precision, threads)
    load_s = time.perf_counter() - started
    ids = [peer.prefill(random_ids(64))]
    first_token_s = time.time() - spawned
    ids += peer.decode(STEPS)
    while time.perf_counter() - started < load_s + WARM_S:
        peer.prefill(random_ids(64))
        peer.decode(STEPS)
    checks = check(peer, ids, json.loads((work / "expected.json").read_text()))
    print(json.dumps({"load_s": load_s, "first_token_s": first_token_s, **checks}), file=answers, flush=True)
    steps = TEXTBOOK_STEPS if name == "textbook" else TIMED_STEPS
    for line in sys.stdin:
        peer.rest()
        print(json.dumps(measure(peer, line.strip(), steps)), file=answers, flush=True)


def measure(peer: Peer, figure: str, steps: int) -> float:
    """Return one figure of ``TIMED``, or the peak of memory."""
    if figure == "peak_rss_mb":
        return peak_rss_mb()
    if figure == "prefill_512_tokens_per_s":
        return 512 / seconds(peer.prefill, random_ids(512))
    if figure == "new_text_tokens_per_s":
        started = time.perf_counter()
        peer.prefill(random_ids(64))
        peer.decode(NEW_TOKENS - 1)
        return NEW_TOKENS / (time.perf_counter() - started)
    prompt, count = {
        "decode_64_tokens_per_s": (random_ids(64), steps),
        "decode_832_tokens_per_s": (random_ids(832), steps),
        "repetitive_tokens_per_s": (REPETITIVE, 2 * steps),
    }[figure]
    peer.prefill(prompt)
    peer.decode(2)  # what is built at a new length is built here
    return count / seconds(peer.decode, count)


def check(peer: Peer, ids: list[int], expected: dict[str, Any]) -> dict[str, Any]:
    """Hold the peer's answers against the book's loop in PyTorch."""
    agreed = [peer.prefill(prompt) == answer for prompt, answer in zip(CHECKS, expected["next"], strict=True)]
    return {
        "same_ids": ids == expected["ids"],
        "top1_agreement": sum(agreed) / len(agreed),
        "loops": [peer.prefill(REPETITIVE), *peer.decode(31)] == LOOP * 2,
    }


def seconds(function: Any, argument: Any) -> float:
    started = time.perf_counter()
    function(argument)
    return time.perf_counter() - started


def peak_rss_mb() -> float:
    """Of this process alone: getrusage would also count what its parent held when it started this one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024 / 1e6


class PeerFailedError(Exception):
    """A peer cannot run; the text says why."""


class Running:
    """A peer in a process of its own, which is stopped but while it answers."""

    def __init__(self, work: Path, name: str, precision: str, threads: int, log: IO[str]) -> None:
        self._log = log
        command = [sys.executable, __file__, "serve", str(work), name, precision, str(threads), str(time.time())]
        self._process = subprocess.Popen(command, stdin=PIPE, stdout=PIPE, stderr=log, text=True)
        self.loaded: dict[str, Any] = self._answer()

    def ask(self, figure: str) -> float:
        """Return a figure. Raises ``PeerFailedError``."""
        self._process.send_signal(signal.SIGCONT)
        with contextlib.suppress(BrokenPipeError):  # _answer() says why
            print(figure, file=self._process.stdin, flush=True)
        value: float = self._answer()
        return value

    def _answer(self) -> Any:
        late = threading.Timer(MAX_S, self._process.kill)
        late.start()
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        late.cancel()
        if line:
            self._process.send_signal(signal.SIGSTOP)
            return json.loads(line)
        self._process.wait()
        self._log.seek(0)
        raise PeerFailedError(reason_of(self._process.returncode, self._log.read()))

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def child(*arguments: str) -> str | None:
    """Run a verb of this file in a process of its own; return the reason where it fails."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_S)
    except subprocess.TimeoutExpired:
        return f"not done after {MAX_S} s"
    return reason_of(done.returncode, done.stderr) if done.returncode else None


def reason_of(code: int, log: str) -> str:
    return f"exit code {code}: {(log.strip().splitlines() or ['no message'])[-1]}"[:200]


def prepare(work: Path, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Write what is not there yet, each in a process of its own; return the reasons of those that failed."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "expected.json").exists():
        print("writing the model", file=sys.stderr)
        if reason := child("model", str(work)):
            raise SystemExit(f"error: {reason}")
    reasons = {}
    for name, precision in wanted:
        ready = work / f"{name}-{precision}.ready"
        if ready.exists():
            continue
        print(f"writing {name} {precision}", file=sys.stderr)
        if reason := child("write", str(work), name, precision):
            reasons[name, precision] = reason
        else:
            ready.touch()
    return reasons


def run(work: Path, output: Path, rounds: int, threads: int, only: list[str]) -> None:
    """Measure round after round, and write the report anew after each."""
    bits = {
        (name, p): b for name, peer in PEERS.items() for p, b in peer.precisions.items() if not only or name in only
    }
    wanted = sorted(bits, key=lambda row: -bits[row])
    results: Results = {f"{n} {p}": [] for n, p in wanted}
    reasons = prepare(work, wanted)
    for (name, precision), reason in reasons.items():
        results[f"{name} {precision}"] = [{"reason": reason}]
    packages = sorted({"numpy", *(package for peer in PEERS.values() for package in peer.packages)})
    for number in range(rounds):
        for size in dict.fromkeys(bits[row] for row in wanted):
            compare(work, [row for row in wanted if bits[row] == size and row not in reasons], threads, number, results)
        write_report(results, {f"{n} {p}": bits[n, p] for n, p in wanted}, output, threads, packages, number + 1)


def compare(work: Path, group: list[tuple[str, str]], threads: int, number: int, results: Results) -> None:
    """Add the figures of a round's ``TURNS`` turns to the results, for each tool of a group."""
    running: dict[str, Running] = {}
    with contextlib.ExitStack() as ends:
        for name, precision in group:
            key = f"{name} {precision}"
            try:
                log = ends.enter_context(tempfile.TemporaryFile("w+"))
                running[key] = Running(work, name, precision, threads, log)
                ends.callback(running[key].end)
            except PeerFailedError as error:
                results[key] = [{"reason": str(error)}]
        for turn in range(TURNS):
            taking = [key for key in running if turn == 0 or key != TEXTBOOK]  # the book's loop takes minutes
            figures = {key: {"turn": number * TURNS + turn, **running[key].loaded} for key in taking}
            for figure in (*TIMED, "peak_rss_mb"):
                for key in [*figures]:
                    try:
                        figures[key][figure] = running[key].ask(figure)
                    except PeerFailedError as error:
                        results[key] = [{"reason": str(error)}]
                        del running[key], figures[key]
            for key, measured in figures.items():
                print(f"round {number + 1}, turn {turn + 1}: {key}: {json.dumps(measured)}", file=sys.stderr)
                results[key].append(measured)


def main() -> None:
    match sys.argv[1:]:  # the verbs of child()
        case ["model", work]:
            write_model(Path(work))
        case ["write", work, name, precision]:
            PEERS[name].write(Path(work), precision)
        case ["serve", work, name, precision, threads, spawned]:
            serve(name, precision, Path(work), int(threads), float(spawned))
        case _:
            parser = argparse.ArgumentParser(description=__doc__)
            parser.add_argument("work", type=Path)
            parser.add_argument("--output", type=Path, required=True)
            parser.add_argument("--rounds", type=int, default=3)
            parser.add_argument("--threads", type=int, default=2)
            parser.add_argument("--only", nargs="+", default=[], choices=PEERS)
            options = parser.parse_args()
            run(options.work, options.output, options.rounds, options.threads, options.only)


if __name__ == "__main__":
    main()
