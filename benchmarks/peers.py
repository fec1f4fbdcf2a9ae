"""gptedge and its peers at one model, on this machine: peers.py WORK --output FOLDER [--rounds 5] [--only NAME ...].

The model has the sizes of GPT-2 124M with an output head of its own, and random weights of a fixed seed; WORK keeps it
in each tool's own form (about 6 GB) for the next run. Each measurement is a process of its own, the rounds go A B C A B
C with tools of the same bits side by side, and the median of the rounds is told with the least and the most. Nothing is
installed: ``pip install "gptedge[export,peers]"`` brings the peers, and one that cannot run is listed with its reason.
FOLDER gets peers.md, peers.svg and peers.json, anew after each round.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
from peer_report import Results, write_report
from peer_tools import PEERS, Peer

MAX_S = 3600  # of one process; an export at int4 takes minutes
WARM_S = 3.0  # after loading: what a tool does in the background, as gptedge moves its weights, is over then


def measure(name: str, precision: str, work: Path, threads: int, spawned: float) -> dict[str, Any]:
    """Return one round's figures of one peer, which this process has to itself."""
    steps = TEXTBOOK_STEPS if name == "textbook" else TIMED_STEPS
    started = time.perf_counter()
    peer = PEERS[name](work, precision, threads)
    load_s = time.perf_counter() - started
    ids = [peer.prefill(random_ids(64))]
    first_token_s = time.time() - spawned
    figures = {"load_s": load_s, "first_token_s": first_token_s}
    ids += peer.decode(STEPS)
    while time.perf_counter() - started < load_s + WARM_S:
        peer.prefill(random_ids(64))
        peer.decode(STEPS)
    figures["prefill_512_tokens_per_s"] = 512 / statistics.median(seconds(peer.prefill, random_ids(512)) for _ in "123")
    prompts = {"decode_64": random_ids(64), "decode_832": random_ids(832), "repetitive": REPETITIVE}
    for what, prompt in prompts.items():
        count = 2 * steps if what == "repetitive" else steps
        peer.prefill(prompt)
        peer.decode(2)  # what is built at a new length is built here
        figures[f"{what}_tokens_per_s"] = count / seconds(peer.decode, count)
    started = time.perf_counter()
    peer.prefill(random_ids(64))
    peer.decode(NEW_TOKENS - 1)
    figures["new_text_tokens_per_s"] = NEW_TOKENS / (time.perf_counter() - started)
    figures["peak_rss_mb"] = peak_rss_mb()
    return {**figures, **check(peer, ids, json.loads((work / "expected.json").read_text()))}


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


def child(*arguments: str) -> dict[str, Any]:
    """Run one verb of this file in a process of its own; where it fails, the answer is its ``reason``."""
    command = [sys.executable, __file__, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_S)
    except subprocess.TimeoutExpired:
        return {"reason": f"not done after {MAX_S} s"}
    if done.returncode == 0:
        answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return answer
    last = (done.stderr.strip().splitlines() or ["no message"])[-1]
    return {"reason": f"exit code {done.returncode}: {last}"[:200]}


def prepare(work: Path, wanted: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Write what is not there yet, each in a process of its own; return the reasons of those that failed."""
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "expected.json").exists():
        print("writing the model", file=sys.stderr)
        if reason := child("model", str(work)).get("reason"):
            raise SystemExit(f"error: {reason}")
    reasons = {}
    for name, precision in wanted:
        ready = work / f"{name}-{precision}.ready"
        if ready.exists():
            continue
        print(f"writing {name} {precision}", file=sys.stderr)
        if reason := child("write", str(work), name, precision).get("reason"):
            reasons[name, precision] = reason
        else:
            ready.touch()
    return reasons


def run(work: Path, output: Path, rounds: int, threads: int, only: list[str]) -> None:
    """Measure round after round, and write the report anew after each."""
    bits = {
        (name, p): b for name, peer in PEERS.items() for p, b in peer.precisions.items() if not only or name in only
    }
    wanted = sorted(bits, key=lambda row: -bits[row])  # what is compared is measured close together
    reasons = prepare(work, wanted)
    results: Results = {f"{n} {p}": [{"reason": r}] for (n, p), r in reasons.items()}
    for turn in range(rounds):
        for name, precision in wanted:
            key = f"{name} {precision}"
            if (name, precision) in reasons:
                continue
            figures = child("measure", str(work), name, precision, str(threads), str(time.time()))
            results.setdefault(key, []).append(figures)
            print(f"round {turn + 1}: {key}: {json.dumps(figures)}", file=sys.stderr)
        packages = sorted({"numpy", *(package for peer in PEERS.values() for package in peer.packages)})
        rows = {f"{n} {p}": results[f"{n} {p}"] for n, p in wanted}
        write_report(rows, {f"{n} {p}": bits[n, p] for n, p in wanted}, output, threads, packages)


def main() -> None:
    match sys.argv[1:]:  # the verbs of child()
        case ["model", work]:
            write_model(Path(work))
            print("{}")
        case ["write", work, name, precision]:
            PEERS[name].write(Path(work), precision)
            print("{}")
        case ["measure", work, name, precision, threads, spawned]:
            print(json.dumps(measure(name, precision, Path(work), int(threads), float(spawned))))
        case _:
            parser = argparse.ArgumentParser(description=__doc__)
            parser.add_argument("work", type=Path)
            parser.add_argument("--output", type=Path, required=True)
            parser.add_argument("--rounds", type=int, default=5)
            parser.add_argument("--threads", type=int, default=2)
            parser.add_argument("--only", nargs="+", default=[], choices=PEERS)
            options = parser.parse_args()
            run(options.work, options.output, options.rounds, options.threads, options.only)


if __name__ == "__main__":
    main()
