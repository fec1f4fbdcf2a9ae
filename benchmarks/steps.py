"""Why drafts come in 4, 8 and 16 and prompts are read in chunks of 64: steps.py BUNDLE [--threads 2] [--rounds 12].

Printed are the milliseconds of a step by the number of its tokens, and the tokens/s of a prompt by the number of tokens
read at a time, which matters to a cache of 8 bits alone; medians over rounds in turns.
BUNDLE has a context of 1,024 tokens.
"""

import argparse
import random
import statistics
import time
from collections import defaultdict

from gptedge_runtime import cache as runtime_cache
from gptedge_runtime import session
from gptedge_runtime.bundle import open_bundle

PASTS, STEPS = (16, 500), (1, 2, 4, 8, 16, 32)
PROMPTS, CHUNKS = (512, 960), (32, 64, 128, 256, 1024)
WARM_S = 6.0  # after opening: by then the weights lie on huge pages
Figures = dict[tuple[int, int], list[float]]


def step_ms(opened: session.Session, ids: list[int], rounds: int) -> Figures:
    found: Figures = defaultdict(list)
    cache, ends = opened.new_cache(1, len(ids)), time.perf_counter() + WARM_S
    while time.perf_counter() < ends:
        cache.prefill([ids], lambda: False)
    for past in PASTS:
        cache = opened.new_cache(1, past + max(STEPS))
        cache.prefill([ids[:past]], lambda: False)
        for turn in range(rounds + 1):
            for size in STEPS:
                cache.shorten(past)
                started = time.perf_counter()
                cache.decode(ids[:1], lambda: False, ids[1:size])
                if turn:  # the first builds what later ones find
                    found[past, size].append(1e3 * (time.perf_counter() - started))
    return found


def tokens_per_s(opened: session.Session, ids: list[int], rounds: int) -> Figures:
    found: Figures = defaultdict(list)
    for _ in range(rounds):
        for length in PROMPTS:
            for runtime_cache.CHUNK_TOKENS in CHUNKS:
                cache = opened.new_cache(1, length)
                started = time.perf_counter()
                cache.prefill([ids[:length]], lambda: False)
                found[length, runtime_cache.CHUNK_TOKENS].append(length / (time.perf_counter() - started))
    return found


def show(title: str, columns: tuple[int, ...], found: Figures, places: int) -> None:
    print(f"\n| {title} | {' | '.join(map(str, columns))} |\n|---|{'---:|' * len(columns)}")
    for row in sorted({row for row, _ in found}):
        print(f"| {row} | {' | '.join(f'{statistics.median(found[row, c]):,.{places}f}' for c in columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    opened = session.Session(open_bundle(options.bundle), provider="cpu", threads=options.threads)
    ids = random.Random(0).choices(range(opened.model.vocab_size), k=max(PROMPTS))
    show("ms of a step, behind tokens", STEPS, step_ms(opened, ids, options.rounds), 1)
    show("prompt, tokens/s by chunk", CHUNKS, tokens_per_s(opened, ids, max(3, options.rounds // 4)), 0)


if __name__ == "__main__":
    main()
