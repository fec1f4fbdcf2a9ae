"""Use one bundle for minutes or days, and see what grows: soak.py BUNDLE [--minutes 15] [--threads 4].

Random lengths, one request in ten is bad, every hundredth opens and closes the bundle. Fifteen times or more, at least
once a minute, a line of JSON: requests, refusals, RSS, open files, threads. The first third of the time is for warming
up: glibc gives threads memory from several arenas, each of which keeps the most that it was ever asked for, so that RSS
creeps up to its level over tens of thousands of requests (MALLOC_ARENA_MAX=1 takes a tenth less, and is there sooner).
Exit code 1 where the mean RSS of the last third is more than 2 % above that of the middle one, where more files or
threads stay than the requests under way hold, or where a request got anything but ids or a documented error.
"""

import argparse
import json
import os
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gptedge_runtime import GPT, InputError, Sampling, load

BAD: list[Any] = [[], [-1], [2**40], [1.5], "text", None, [[1], []], [[[1]]]]
GROWTH = 1.02
UNDER_WAY = 4  # files and threads that one request, or one opening of the bundle, may hold


def request(gpt: GPT, dice: random.Random) -> bool:
    """Send one request; return whether it was refused."""
    context, vocab_size = gpt.config.context_length, gpt.config.vocab_size
    if dice.random() < 0.1:
        try:
            gpt.generate_ids(dice.choice(BAD), max_new_tokens=1)
        except InputError:
            return True
        raise AssertionError("a bad request was answered")
    lengths = [dice.randint(1, min(2 * context, 256)) for _ in range(dice.randint(1, 3))]
    rows = [[dice.randrange(vocab_size) for _ in range(length)] for length in lengths]
    count, sampling = dice.randint(0, 16), dice.choice([None, Sampling(seed=1)])
    answers = gpt.generate_ids(rows, max_new_tokens=count, sampling=sampling)
    assert [len(answer) for answer in answers] == [count] * len(rows)
    return False


def usage() -> dict[str, int]:
    """Return what this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "rss_kib": pages * os.sysconf("SC_PAGE_SIZE") // 1024,
        "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - a Path for each would count itself
        "threads": len(os.listdir("/proc/self/task")),  # noqa: PTH208
    }


def mean(samples: list[dict[str, int]]) -> dict[str, int]:
    """Return the mean of each figure: what a single request holds comes and goes."""
    return {name: sum(sample[name] for sample in samples) // len(samples) for name in samples[0]}


def work(gpt: GPT, bundle: str, end: float, seed: int, counts: list[int]) -> None:
    """Send requests until the time is over; ``counts`` are those sent and those refused."""
    dice = random.Random(seed)
    while time.monotonic() < end:
        counts[1] += request(gpt, dice)
        counts[0] += 1
        if counts[0] % 100 == 0:
            with load(bundle) as other:
                request(other, dice)


def main() -> int:
    """Run the soak and return its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    seconds = 60 * options.minutes
    started = time.monotonic()
    counts = [[0, 0] for _ in range(options.threads)]
    samples: list[dict[str, int]] = []
    with load(options.bundle) as gpt, ThreadPoolExecutor(options.threads) as pool:
        jobs = [
            pool.submit(work, gpt, options.bundle, started + seconds, seed, counts[seed])
            for seed in range(options.threads)
        ]
        while not all(job.done() for job in jobs):
            time.sleep(min(60.0, seconds / 16))
            samples.append(usage())
            sums = {"requests": sum(c[0] for c in counts), "refused": sum(c[1] for c in counts)}
            print(json.dumps(sums | samples[-1]), flush=True)
        for job in jobs:
            job.result()
    third = len(samples) // 3
    warm, last = mean(samples[third : 2 * third]), mean(samples[2 * third :])
    spare = UNDER_WAY * options.threads
    limits = {"rss_kib": warm["rss_kib"] * GROWTH, "files": warm["files"] + spare, "threads": warm["threads"] + spare}
    grown = [name for name, limit in limits.items() if last[name] > limit]
    print(json.dumps({"warm": warm, "last": last, "grown": grown}))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
