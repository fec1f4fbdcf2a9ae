"""What the place of the weights in memory changes: weights.py BUNDLE [--threads 2] [--rounds 8].

float32 weights are packed when a bundle is opened, or used where the file is mapped; integers move to huge pages, or
stay. A round is a process of each kind. Printed are medians (least-most) of milliseconds: of opening, of each of the
first 64 tokens (when nothing has moved yet), and then of a step of 1 and of 8 tokens.
BUNDLE has a context of 1,024 tokens.
"""

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from typing import Any

from gptedge_runtime import huge_pages, session
from gptedge_runtime.bundle import open_bundle


def step_ms(opened: session.Session, length: int, steps: int, size: int = 1) -> float:
    """Return the time of a step of ``size`` tokens behind ``length``."""
    ids = random.Random(0).choices(range(opened.model.vocab_size), k=length)
    cache = opened.new_cache(1, length + steps + size)
    cache.prefill([ids], lambda: False)
    started = time.perf_counter()
    for token_id in ids[:steps]:
        cache.decode([token_id], lambda: False, ids[1:size])
    return 1e3 * (time.perf_counter() - started) / steps


def measure(path: str, threads: int, plain: bool) -> dict[str, float]:
    started = time.perf_counter()
    bundle = open_bundle(path)
    if plain:
        session.huge_pages = contextlib.nullcontext
    exact = plain and bundle.rounds_finely  # that is, not packed
    opened = session.Session(bundle, provider="cpu", threads=threads, exact=exact)
    figures = {"opening": 1e3 * (time.perf_counter() - started), "first 64": step_ms(opened, 64, 64)}
    time.sleep(4 * huge_pages.DELAY_S)
    step_ms(opened, 64, 8)
    for length in (64, 832):
        for size in (1, 8):
            figures[f"{size} behind {length}"] = statistics.median(step_ms(opened, length, 32, size) for _ in range(3))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--child", choices=("moved", "plain"))
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.bundle, options.threads, options.child == "plain")))
        return
    found: dict[str, list[dict[str, Any]]] = {"plain": [], "moved": []}
    for _ in range(options.rounds):
        for kind, rounds in found.items():
            command = [sys.executable, __file__, options.bundle, "--threads", str(options.threads), "--child", kind]
            rounds.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    print("| ms | mapped, or small pages | packed, or huge pages | ratio |\n|---|---:|---:|---:|")
    for what in found["moved"][0]:
        plain, moved = ([figures[what] for figures in rounds] for rounds in found.values())
        spread = [f"{statistics.median(x):.2f} ({min(x):.2f}-{max(x):.2f})" for x in (plain, moved)]
        print(f"| {what} | {spread[0]} | {spread[1]} | {statistics.median(plain) / statistics.median(moved):.2f} |")


if __name__ == "__main__":
    main()
