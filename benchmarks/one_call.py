"""What a token costs in generate.onnx beside the runtime's loop: one_call.py BUNDLE [--past 64 800] [--rounds 5].

Both write the same number of tokens after random ids, in turns and on one thread. The figure is the process's CPU time,
so that other work on the machine matters little; the time of a run with one new token is taken off, and with it the
prefill. A line of JSON for each past: ms per token, the least and the median of the rounds, and the ratio of the least.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator

import numpy as np
from gptedge_runtime import load
from gptedge_runtime.bundle import open_bundle
from gptedge_runtime.generate import generate

Write = Callable[[list[int], int], list[int]]


def programs(folder: str) -> Iterator[tuple[str, Write]]:
    """The two ways from a prompt and a number of new tokens to their ids."""
    gpt = load(folder, threads=1)  # it sets what must stand before onnxruntime is imported

    def loop(prompt: list[int], count: int) -> list[int]:
        steps = generate(gpt._session, [prompt], [count], sampling=None, should_stop=lambda: False, speculate=False)
        return [step[0] for step in steps]

    yield "loop", loop
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    path = open_bundle(folder).graphs["generate"].path
    session = ort.InferenceSession(f"{folder}/{path}", options, providers=["CPUExecutionProvider"])

    def one_call(prompt: list[int], count: int) -> list[int]:
        ids = np.array([prompt])
        numbers = {"max_new_tokens": np.array(count), "eos_token_id": np.array(-1)}
        (output_ids,) = session.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids), **numbers})
        new_ids: list[int] = output_ids[0, len(prompt) :].tolist()
        return new_ids

    yield "one_call", one_call


def cpu_ms(write: Write, prompt: list[int], count: int) -> tuple[float, list[int]]:
    """CPU time of a run in milliseconds, and its ids."""
    started = time.process_time()
    ids = write(prompt, count)
    return 1000 * (time.process_time() - started), ids


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--past", type=int, nargs="+", default=[64, 800])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    vocab_size = open_bundle(options.bundle).model.vocab_size
    both = dict(programs(options.bundle))
    for past in options.past:
        prompt = np.random.default_rng(past).integers(vocab_size, size=past).tolist()
        times: dict[str, list[float]] = {name: [] for name in both}
        for write in both.values():
            write(prompt, 1)  # at int8 a long prompt opens prefill.onnx
        for _ in range(options.rounds):
            ids = {}
            for name, write in both.items():
                first_ms, _ = cpu_ms(write, prompt, 1)
                all_ms, ids[name] = cpu_ms(write, prompt, 1 + options.new_tokens)
                times[name].append((all_ms - first_ms) / options.new_tokens)
        line: dict[str, object] = {"past": past, "same_ids": ids["loop"] == ids["one_call"]}
        for name, ms in times.items():
            line[f"{name}_ms"] = [round(min(ms), 2), round(statistics.median(ms), 2)]
        line["ratio"] = round(min(times["one_call"]) / min(times["loop"]), 2)
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
