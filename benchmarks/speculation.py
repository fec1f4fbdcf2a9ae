"""What prompt lookup gains or costs: speculation.py BUNDLE [--prompt TEXT ...] [--new-tokens 256] [--rounds 5].

With --text-of OTHER the bundle OTHER chooses the tokens and BUNDLE's steps are timed: how fast a model of BUNDLE's size
would write OTHER's texts.
Each prompt is continued with and without drafts, in turn. A line of JSON for each: the share of the new ids that end an
n-gram of the text, as long as most drafts take; the steps of either loop; ms per token, least and median
of the rounds; and the ratio plain / speculative. Where nothing is drafted the loops take the same steps, and differ by
the lookup and by what else the machine does. Exit code 1 where the two loops wrote other ids.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any, ClassVar

from gptedge_runtime import GPT, cache, load, session
from gptedge_runtime.cache import Cache, Step
from gptedge_runtime.generate import generate
from gptedge_runtime.speculate import LONG

PROMPTS = [
    "One windy day, Leo",
    "Once upon a time",
    "Mia had a red ball",
    "The old dog",
    "Tom and Ana went to the park",
    "It was raining",
    "A little bird",
    "Sam found a key",
    "The king",
    "Every morning, Lily",
    "Ben was sad",
    "On Sunday, Grandma",
]


class Dictation(Cache):
    """Chooses the next id of a given text."""

    text: ClassVar[list[int]] = []

    def best_ids(self, rows: Sequence[int]) -> list[int]:
        super().best_ids(rows)
        return [self.text[self.length]]


class CountedStep(Step):
    """Counts the steps that ran."""

    count = 0

    def run(self, *arguments: Any) -> None:
        CountedStep.count += 1
        super().run(*arguments)


def measure(gpt: GPT, prompt: list[int], new_tokens: int, *, speculate: bool) -> tuple[list[int], float, int]:
    """Return the new ids, ms per token after the first, and the number of steps."""
    steps = generate(
        gpt._session, [prompt], [new_tokens], sampling=None, should_stop=lambda: False, speculate=speculate
    )
    new_ids, before = [next(steps)[0]], CountedStep.count
    started = time.perf_counter()
    new_ids += [step[0] for step in steps]
    return new_ids, 1000 * (time.perf_counter() - started) / (new_tokens - 1), CountedStep.count - before


def repeated(prompt: list[int], new_ids: list[int]) -> float:
    """Return the share of the new ids that end an n-gram which stood before."""
    ngram, row, seen, count = LONG.ngram, prompt + new_ids, set[tuple[int, ...]](), 0
    for end in range(ngram, len(row) + 1):
        count += end > len(prompt) and tuple(row[end - ngram : end]) in seen
        seen.add(tuple(row[end - ngram : end]))
    return count / len(new_ids)


def main() -> int:
    """Run the comparison and return its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("bundle")
    parser.add_argument("--prompt", action="append")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text-of")
    options = parser.parse_args()
    prompts = options.prompt or PROMPTS
    same, cache.Step = True, CountedStep
    texts: list[list[int]] = []
    if options.text_of:
        with load(options.text_of) as author:
            encoded = [author.tokenizer.encode(text) for text in prompts]
            texts = [ids + measure(author, ids, options.new_tokens, speculate=False)[0] for ids in encoded]
        session.Cache = Dictation  # type: ignore[misc]
    with load(options.bundle) as gpt:
        for i, text in enumerate(prompts):
            prompt = gpt.tokenizer.encode(text)
            if texts:
                Dictation.text, prompt = texts[i], texts[i][: -options.new_tokens]
            runs: dict[bool, list[tuple[list[int], float, int]]] = {False: [], True: []}
            for turn in range(2 * options.rounds):
                speculate = turn % 4 in (1, 2)  # neither is always the first of its pair
                runs[speculate].append(measure(gpt, prompt, options.new_tokens, speculate=speculate))
            plain, speculative = ([ms for _, ms, _ in runs[speculate]] for speculate in (False, True))
            same &= all(new_ids == runs[False][0][0] for new_ids, *_ in runs[False] + runs[True])
            line = {
                "prompt": text[:24],
                "repeated": round(repeated(prompt, runs[False][0][0]), 3),
                "plain_steps": runs[False][-1][2],
                "speculative_steps": runs[True][-1][2],
                "plain_ms": [round(min(plain), 3), round(statistics.median(plain), 3)],
                "speculative_ms": [round(min(speculative), 3), round(statistics.median(speculative), 3)],
                "ratio": round(statistics.median(plain) / statistics.median(speculative), 3),
                "ratio_of_least": round(min(plain) / min(speculative), 3),
                "same_ids": same,
            }
            print(json.dumps(line), flush=True)
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
