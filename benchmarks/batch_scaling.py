"""The tables of docs/batch.md: batch_scaling.py BUNDLE [WORKERS ...].

It needs Ray. The figures there are of `export-onnx random --config gpt2-small -o BUNDLE`.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gptedge_runtime import GPT, load

WORDS = ["a", "small", "cat", "friend", "went", "behind", "that", "door"]
RAY_ROWS, RAY_PROMPT_TOKENS, RAY_BATCH = 128, 12, 4
SPEED_ROWS, SPEED_PROMPT_TOKENS, NEW_TOKENS = (1, 32), 32, 24
BILLION = 10**9


def make_prompts(gpt: GPT, n_rows: int, n_tokens: int) -> list[str]:
    rng = random.Random(0)
    texts = [gpt.tokenizer.encode(" ".join(rng.choices(WORDS, k=64))) for _ in range(n_rows)]
    return [gpt.tokenizer.decode(ids[:n_tokens]) for ids in texts]


def measure_ray(bundle: str, prompts: list[str], worker_counts: list[int]) -> None:
    """Print the time of the whole command by the number of workers of one thread, start of Ray included."""
    print("| workers of 1 thread | time | answers |\n|---|---|---|")
    options = ["-n", str(NEW_TOKENS), "--batch-size", str(RAY_BATCH), "--engine", "ray", "--threads", "1"]
    with tempfile.TemporaryDirectory() as folder:
        source, answers = Path(folder) / "in.jsonl", set[bytes]()
        source.write_text("".join(json.dumps({"id": i, "prompt": text}) + "\n" for i, text in enumerate(prompts)))
        for workers in worker_counts:
            target = Path(folder) / f"{workers}.jsonl"
            started = time.perf_counter()
            command = ["gptedge", "batch", bundle, source, target, *options, "--workers", str(workers)]
            subprocess.run(command, check=True)
            seconds = time.perf_counter() - started
            answers.add(target.read_bytes())
            print(f"| {workers} | {seconds:.1f} s | {'the same bytes' if len(answers) == 1 else 'OTHER BYTES'} |")


def measure_speed(gpt: GPT) -> None:
    """Print new tokens/s, prompts included, by rows at a time, and what a billion of them cost."""
    cores = len(os.sched_getaffinity(0))
    print(f"\n| rows at a time | tokens/s on {cores} cores | a billion tokens |\n|---|---|---|")
    for n_rows in SPEED_ROWS:
        prompts = make_prompts(gpt, n_rows, SPEED_PROMPT_TOKENS)
        asked = [gpt.request(text, max_new_tokens=NEW_TOKENS, stop=None, on_overflow="slide") for text in prompts]
        n_tokens, started = 0, time.perf_counter()
        while time.perf_counter() - started < 10:
            n_tokens += sum(len(row.token_ids) for row in gpt.generate_batch(asked))
        per_s = n_tokens / (time.perf_counter() - started)
        print(f"| {n_rows} | {per_s:,.0f} | {BILLION / per_s / 3600 * cores:,.0f} core-hours |")


if __name__ == "__main__":
    with load(sys.argv[1]) as gpt:
        measure_speed(gpt)
        prompts = make_prompts(gpt, RAY_ROWS, RAY_PROMPT_TOKENS)
    measure_ray(sys.argv[1], prompts, [int(count) for count in sys.argv[2:]] or [1, 2])
