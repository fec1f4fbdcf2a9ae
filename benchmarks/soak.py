"""Use one bundle for minutes or days, and see what grows: soak.py BUNDLE [--minutes 10] [--threads 4].

Random lengths, one request in ten is bad, every hundredth opens and closes the bundle. Once a minute, and at the end, a
line of JSON: requests, refusals, RSS, open files, threads. Exit code 1 where RSS grew by more than 2 % after the first
fifth of the time (of ten minutes at least: the allocator's pools fill slowly), where more files or threads stay than
the requests under way hold, or where a request got anything but ids or a documented error.
"""

import argparse
import json
import os
import random
import sys
import threading
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
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    seconds = 60 * options.minutes
    started = time.monotonic()
    counts = [[0, 0] for _ in range(options.threads)]
    with load(options.bundle) as gpt, ThreadPoolExecutor(options.threads) as pool:
        jobs = [
            pool.submit(work, gpt, options.bundle, started + seconds, seed, counts[seed])
            for seed in range(options.threads)
        ]
        time.sleep(seconds / 5)
        warm, last = usage(), usage()
        while not all(job.done() for job in jobs):
            threading.Event().wait(min(60.0, seconds / 10))
            last = usage()
            print(json.dumps({"requests": sum(c[0] for c in counts), "refused": sum(c[1] for c in counts), **last}))
        for job in jobs:
            job.result()
    spare = UNDER_WAY * options.threads
    limits = {"rss_kib": warm["rss_kib"] * GROWTH, "files": warm["files"] + spare, "threads": warm["threads"] + spare}
    grown = [name for name, limit in limits.items() if last[name] > limit]
    print(json.dumps({"warm": warm, "last": last, "grown": grown}))
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
