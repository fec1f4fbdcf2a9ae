"""What benchmarks/peers.py measured, as a Markdown table and a plot."""

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from peer_models import TEXTBOOK_STEPS, TIMED_STEPS

Results = dict[str, list[dict[str, Any]]]
"""Tool and precision -> the figures of each turn, or a ``reason`` why there are none."""

COLUMNS = {
    "prefill_512_tokens_per_s": "prefill, 512 tokens",
    "decode_64_tokens_per_s": "decode after 64",
    "decode_832_tokens_per_s": "decode after 832",
    "repetitive_tokens_per_s": "decode, text that repeats",
    "new_text_tokens_per_s": "prompt of 64 and 200 new tokens",
    "load_s": "load, s",
    "first_token_s": "process start to first token, s",
    "peak_rss_mb": "peak RSS, MB",
}

TIMED = [figure for figure in COLUMNS if "per_s" in figure]
"""What tools are measured at in turns."""

TEXTBOOK = "textbook fp32"
ROUNDED_BY_GPTEDGE = ("onnxruntime-genai int8", "onnxruntime-genai int4")
"""Other tools that read the weights as gptedge rounds them: without gptedge a user has their ``plain`` rows."""

NOTES = """
Tokens/s of one row, greedy, after six seconds of decoding; medians of {turns} turns (quartiles) in {rounds} rounds,
each of them a process, files in the page cache. Tools of the same bits stay loaded in a round, and each is measured
while the others are stopped: a ratio is the median of those within a turn, so within a minute, and within two for the
textbook loop, which takes one turn of each round. The model has GPT-2 124M's sizes, an output head of its own and
random weights; it repeats the text that repeats. Same ids: 33 tokens behind a prompt of 64, against the book's loop in
PyTorch. Top-1 agreement: the next ids of 100 prompts of 16 tokens; random weights choose between closer logits than
trained ones, so that rounding turns more choices.

Tools at their defaults but for the threads: llama.cpp holds keys and values in 16 bits and OpenVINO in 8, both at every
precision, gptedge in 8 at int8 and int4, all else in 32. Of a head of 8 bits gptedge reads 4 for each token and
8 for the 32 best by these. With weights of 4 bits the head has 4 in gptedge, 6 in llama.cpp
(Q6_K) and 8 in OpenVINO: gptedge, and onnxruntime-genai with it, reads the fewest bytes of weights. The own
builder of onnxruntime-genai knows no GPT-2: it reads `model.onnx` of gptedge's bundles, and as "plain" that of the
float32 bundle, rounded by ONNX Runtime's own tool (`MatMulNBitsQuantizer`, blocks of 128, accuracy level 4), the head
too. "fa-off" is llama.cpp without flash attention. CTranslate2 has no 4 bits on a CPU. The textbook loop is timed over
{textbook_steps} steps, the others over {steps}.

Only gptedge guesses tokens by looking back unasked: its column of text that repeats is the best case, in which every
guess is right. llama.cpp, OpenVINO GenAI and transformers can do so on request, which is not measured.
OpenVINO computes in bfloat16 where the processor can, unless it is told otherwise: at fp32 it is, at bf16 (the same
file), int8 and int4 it is not. Its model is converted here: within a few percent of optimum-intel's at decoding, up to
a fifth slower at reading prompts in fp32.
"""


def table(results: Results) -> Iterator[str]:
    """Yield the lines of a Markdown table, a tool at a precision in each; the numbers are tokens/s but where said."""
    yield f"| | {' | '.join(COLUMNS.values())} | same ids as PyTorch | top-1 agreement |"
    yield "|---" * (len(COLUMNS) + 3) + "|"
    for name, rounds in results.items():
        if reason := failure(rounds):
            yield f"| {name} | {reason.replace('|', '/')} {'|' * (len(COLUMNS) + 2)}"
            continue
        cells = [spread([one[key] for one in rounds]) for key in COLUMNS]
        same, agreed = all(one["same_ids"] for one in rounds), rounds[-1]["top1_agreement"]
        if not all(one["loops"] for one in rounds):
            cells[[*COLUMNS].index("repetitive_tokens_per_s")] += " of another text"
        yield f"| {name} | {' | '.join(cells)} | {'yes' if same else 'no'} | {agreed:.0%} |"


def ratios(results: Results, bits: dict[str, int]) -> Iterator[str]:
    """Yield the lines of a table: gptedge's speed over that of the other tool of the same bits that is the fastest.

    The fastest is the one to which the median of the ratios is the least. They are taken turn by turn, since a machine
    that is slow in one is slow for both. The textbook loop gets a line of its own.
    """
    measured = {name: rounds for name, rounds in results.items() if not failure(rounds)}
    yield f"| gptedge / best other tool | {' | '.join(COLUMNS[key] for key in TIMED)} |"
    yield "|---" * (1 + len(TIMED)) + "|"

    def line(ours: str, others: list[str], label: str) -> str:
        cells = []
        by_turn = {one["turn"]: one for one in measured[ours]}
        for key in TIMED:
            found = {name: [by_turn[one["turn"]][key] / one[key] for one in measured[name]] for name in others}
            best = min(others, key=lambda name: statistics.median(found[name]))
            cells.append(f"{spread(found[best], 2)} ({best})")
        return f"| {label} | {' | '.join(cells)} |"

    ours = [name for name in measured if name.startswith("gptedge")]
    apart = [*ours, TEXTBOOK]
    for name in ours:
        if others := [other for other in measured if bits[other] == bits[name] and other not in apart]:
            yield line(name, others, name)
            alone = [other for other in others if other not in ROUNDED_BY_GPTEDGE]
            if alone not in ([], others):
                yield line(name, alone, f"{name}, to tools without its bundles")
    if {"gptedge fp32", TEXTBOOK} <= measured.keys():
        yield line("gptedge fp32", [TEXTBOOK], "gptedge fp32")


def failure(rounds: list[dict[str, Any]]) -> str | None:
    return next((one["reason"] for one in rounds if "reason" in one), None)


def spread(values: list[float], digits: int | None = None) -> str:
    middle = statistics.median(values)
    if digits is None:
        digits = 1 if middle < 100 else 0
    low, _, high = statistics.quantiles(values, method="inclusive") if len(values) > 1 else values * 3
    return f"{middle:,.{digits}f} ({low:,.{digits}f}-{high:,.{digits}f})"


def machine(threads: int, packages: Iterable[str]) -> Iterator[str]:
    """Yield what the figures depend on."""
    info = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.processor())
    flags = {flag for line in info if line.startswith("flags") for flag in line.split()}
    simd = sorted(flags & {"avx2", "avx512f", "avx_vnni", "avx512_vnni", "avx512_bf16"})
    yield f"- {model} ({' '.join(simd)}), {len(os.sched_getaffinity(0))} CPUs, {threads} threads, {platform.platform()}"
    yield f"- Python {platform.python_version()}, " + ", ".join(f"{name} {version(name)}" for name in packages)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def plot(results: Results, path: Path) -> None:
    """Draw decode speed behind a short and behind a long text, a bar for each tool and precision."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    measured = {name: rounds for name, rounds in reversed(results.items()) if not failure(rounds)}
    figure, axes = plt.subplots(figsize=(8, 0.4 * len(measured) + 1.2), layout="constrained")
    for offset, (key, label) in enumerate([("decode_832_tokens_per_s", "832"), ("decode_64_tokens_per_s", "64")]):
        values = [statistics.median(one[key] for one in rounds) for rounds in measured.values()]
        bars = axes.barh(np.arange(len(measured)) + 0.4 * offset - 0.2, values, 0.4, label=f"after {label} tokens")
        axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.set_yticks(range(len(measured)), list(measured))
    axes.set_xlabel("decode, tokens/s")
    axes.margins(x=0.1)  # the longest bar has room for its figure
    axes.legend()
    figure.savefig(path)


def write_report(
    results: Results, bits: dict[str, int], output: Path, threads: int, packages: Iterable[str], rounds: int
) -> None:
    """Write peers.json, peers.md and peers.svg; ``bits``: of a weight, by tool and precision."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "peers.json").write_text(json.dumps(results, indent=1) + "\n")
    turns = max(len(one) for one in results.values())
    notes = NOTES.format(turns=turns, rounds=rounds, steps=TIMED_STEPS, textbook_steps=TEXTBOOK_STEPS)
    lines = [*table(results), "", *ratios(results, bits), notes, *machine(threads, packages)]
    (output / "peers.md").write_text("\n".join(lines) + "\n", "utf-8")
    plot(results, output / "peers.svg")
