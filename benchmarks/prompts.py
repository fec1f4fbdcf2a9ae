"""A bundle's prompts by decode.onnx and by prefill.onnx: prompts.py BUNDLE [--lengths 96,128,...] [--rounds 9].

Milliseconds of a prompt, medians of rounds in turns, and of the first one of a process, for which prefill.onnx has to
be opened; the peak of that process's memory, and the largest difference of a key or value, in steps of 8 bits.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from gptedge_runtime import session as module
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.session import Session

LEAST = {"decode": sys.maxsize, "prefill": 0}
"""Tokens of a prompt that is read by prefill.onnx."""


def read(session: Session, graph: str, length: int) -> tuple[float, list[Any]]:
    """Milliseconds, keys and values."""
    module.MIN_TOKENS = dict.fromkeys(module.MIN_TOKENS, LEAST[graph])
    ids = np.random.default_rng(length).integers(session.model.vocab_size, size=length).tolist()
    cache = session.new_cache(1, length)
    started = time.perf_counter()
    cache.prefill([ids], lambda: False)
    return 1e3 * (time.perf_counter() - started), cache.key_values


def first(bundle: str, graph: str, length: int, threads: int) -> tuple[float, float]:
    """Milliseconds of a process's first prompt, and its peak in MB."""
    command = [sys.executable, __file__, bundle, "--lengths", str(length), "--threads", str(threads), "--first", graph]
    ms, peak_mb = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return ms, peak_mb


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--lengths", default="64,96,128,256,512,1000")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--first", help=argparse.SUPPRESS)
    options = parser.parse_args()
    lengths = [int(length) for length in options.lengths.split(",")]
    session = Session(open_bundle(options.bundle), provider="cpu", threads=options.threads)
    if options.first:
        ms, _ = read(session, options.first, *lengths)
        peak = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())  # getrusage tells the parent's, too
        print(json.dumps([ms, int(peak[1]) / 1e3 if peak else 0]))
        return
    times: dict[tuple[str, int], list[float]] = {(graph, length): [] for length in lengths for graph in LEAST}
    for _ in range(options.rounds):
        for graph, length in times:
            times[graph, length].append(read(session, graph, length)[0])
    print("| tokens | decode, ms | prefill, ms | ratio | first: decode, prefill | peak MB: the same | steps apart |")
    print("|---:|---:|---:|---:|---|---|---:|")
    for length in lengths:
        ms = [statistics.median(times[graph, length]) for graph in LEAST]
        alone = [[first(options.bundle, graph, length, options.threads) for _ in range(3)] for graph in LEAST]
        firsts, peaks = ([statistics.median(x[i] for x in runs) for runs in alone] for i in (0, 1))
        pairs = zip(*(read(session, graph, length)[1] for graph in LEAST), strict=True)
        apart = max(int(np.abs(a.astype(int) - b).max()) for a, b in pairs)
        print(
            f"| {length:,} | {ms[0]:.0f} | {ms[1]:.0f} | {ms[0] / ms[1]:.2f} | {firsts[0]:.0f}, {firsts[1]:.0f} "
            f"| {peaks[0]:.0f}, {peaks[1]:.0f} | {apart} |"
        )


if __name__ == "__main__":
    main()
