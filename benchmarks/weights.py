"""What the place of the weights in memory changes: weights.py BUNDLE [--threads 2] [--rounds 12].

ONNX Runtime's copy of them moves to huge pages, or stays on small ones; float32 weights can also be used where the file
is mapped. BUNDLE, which has a context of 1,024 tokens, is opened in each way, and the rounds go in turns. Printed are
milliseconds: of each of the first 64 tokens, when nothing has moved yet, and then of a step of 1 and of 8 tokens,
medians, with the median of the ratios within a round (quartiles).
"""

import argparse
import contextlib
import random
import statistics
import threading
import time
from collections import defaultdict

from gptedge_runtime import session
from gptedge_runtime.bundle import Bundle, open_bundle
from gptedge_runtime.huge_pages import huge_pages


def step_ms(opened: session.Session, length: int, steps: int, size: int = 1) -> float:
    """Return the time of a step of ``size`` tokens behind ``length``."""
    ids = random.Random(0).choices(range(opened.model.vocab_size), k=length)
    cache = opened.new_cache(1, length + steps + size)
    cache.prefill([ids], lambda: False)
    started = time.perf_counter()
    for token_id in ids[:steps]:
        cache.decode([token_id], lambda: False, ids[1:size])
    return 1e3 * (time.perf_counter() - started) / steps


def open_in(kind: str, bundle: Bundle, threads: int) -> session.Session:
    session.huge_pages = huge_pages if kind == "huge pages" else contextlib.nullcontext
    return session.Session(bundle, provider="cpu", threads=threads, exact=kind == "mapped")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    bundle = open_bundle(options.bundle)
    kinds = ["huge pages", "small pages", *(["mapped"] if bundle.rounds_finely else [])]
    opened: dict[str, session.Session] = {}
    figures: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for kind in kinds:
        opened[kind] = open_in(kind, bundle, options.threads)
        figures["each of the first 64 tokens"][kind] = [step_ms(opened[kind], 64, 64)]
    for timer in threading.enumerate():
        if isinstance(timer, threading.Timer):
            timer.join()
    for _ in range(options.rounds):
        for length in (64, 832):
            for size in (1, 8):
                for kind in kinds:
                    ms = step_ms(opened[kind], length, 32, size)
                    figures[f"a step of {size} behind {length}"].setdefault(kind, []).append(ms)
    print(f"| ms | {' | '.join(kinds)} |\n|---{'|---:' * len(kinds)}|")
    for what, by_kind in figures.items():
        cells = [f"{statistics.median(by_kind[kinds[0]]):.2f}"]
        for kind in kinds[1:]:
            ratios = [ms / huge for ms, huge in zip(by_kind[kind], by_kind[kinds[0]], strict=True)]
            low, middle, high = statistics.quantiles(ratios, method="inclusive") if len(ratios) > 1 else ratios * 3
            cells.append(f"{statistics.median(by_kind[kind]):.2f}, {middle:.2f}x ({low:.2f}-{high:.2f})")
        print(f"| {what} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
