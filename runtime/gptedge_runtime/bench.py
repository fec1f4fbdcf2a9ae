"""How fast a bundle is on this machine: prefill and decode apart, by context length and batch, with their spread."""

import csv
import io
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .bundle import ModelConfig
from .errors import InputError
from .gpt import load
from .inputs import read_count
from .limits import count_threads, never
from .session import Session
from .workers import Worker

PLOT_SUFFIXES = (".svg", ".png")
_BUFFER_BYTES = 256 << 20  # far more than the caches of a CPU hold
_WEIGHT_BYTES = {"fp32": 4.0, "fp16": 4.0, "bf16": 4.0, "int8": 1 + 8 / 64, "int4": 1 / 2 + 8 / 256}
LARGE_HEAD = 1 << 24  # weights, from which on decode.onnx reads 4 bits of a head of 8, and all 8 of single rows
_CACHE_BYTES = {"fp32": 4, "fp16": 4, "bf16": 4, "int8": 1, "int4": 1}


@dataclass(frozen=True)
class Row:
    """Speed at ``context_tokens`` tokens in each of ``batch`` rows; tokens of all rows count. Medians, least and most.

    Prefill reads those tokens into empty caches. Decode is ``new_tokens`` steps behind them. ``mb_per_step`` is what a
    decode step must read, ``bandwidth_share`` how much of the machine's read bandwidth that is at the median speed.
    """

    context_tokens: int
    batch: int
    prefill_tokens_per_s: float
    prefill_tokens_per_s_min: float
    prefill_tokens_per_s_max: float
    decode_tokens_per_s: float
    decode_tokens_per_s_min: float
    decode_tokens_per_s_max: float
    mb_per_step: float
    bandwidth_share: float


@dataclass(frozen=True)
class Bench:
    """``load_s`` holds the check of all files and the import of onnxruntime; MB and GB are powers of ten.

    ``peak_rss_mb`` is the process's peak, mapped weights included; None on Windows. ``read_gb_per_s`` is the best of
    several sums over a buffer far larger than the caches.
    """

    bundle: str
    precision: str
    provider: str
    threads: int
    repeats: int
    new_tokens: int
    load_s: float
    peak_rss_mb: float | None
    read_gb_per_s: float
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class _Times:
    """Seconds of each repeat."""

    context_tokens: int
    batch: int
    prefill_s: list[float]
    decode_s: list[float]


def bench(
    path: str | os.PathLike[str],
    *,
    lengths: Sequence[int] = (64, 512, 832),
    batches: Sequence[int] = (1,),
    new_tokens: int = 32,
    repeats: int = 5,
    threads: int | None = None,
    warn: Callable[[str], object] = lambda note: None,
    progress: bool = False,
) -> Bench:
    """Measure a bundle on random token ids, through the cache that :func:`generate` uses.

    Each length and batch runs once unmeasured, then ``repeats`` times. ``warn`` hears, in a line, of lengths that the
    model's context cannot hold and that are cut. Raises :class:`InputError` and what ``load`` raises.
    """
    lengths = [read_count("length", length, low=1) for length in lengths]
    batches = [read_count("batch", batch, low=1) for batch in batches]
    new_tokens, repeats = read_count("new_tokens", new_tokens, low=1), read_count("repeats", repeats, low=1)
    started = time.perf_counter()
    with load(path, provider="cpu", threads=threads, progress=progress) as gpt:
        load_s, precision = time.perf_counter() - started, gpt._session.precision
        new_tokens = min(new_tokens, max(1, gpt.config.context_length // 2))
        lengths = _fit(lengths, gpt.config.context_length, new_tokens, warn)
        plan = [(length, batch) for batch in batches for length in lengths]
        bar = tqdm(plan, desc="bench", disable=not progress, leave=False)
        times = [_measure(gpt._session, length, batch, new_tokens, repeats) for length, batch in bar]
    n_threads, peak_rss_mb = count_threads(threads), _peak_rss_mb()
    read_gb_per_s = _read_gb_per_s(n_threads)
    return Bench(
        bundle=str(Path(path)),
        precision=precision,
        provider=gpt.provider,
        threads=n_threads,
        repeats=repeats,
        new_tokens=new_tokens,
        load_s=load_s,
        peak_rss_mb=peak_rss_mb,
        read_gb_per_s=read_gb_per_s,
        rows=tuple(_to_row(one, new_tokens, gpt.config, precision, read_gb_per_s) for one in times),
    )


def _fit(lengths: Sequence[int], context_length: int, new_tokens: int, warn: Callable[[str], object]) -> list[int]:
    longest = max(1, context_length - new_tokens)
    if max(lengths) > longest:
        warn(
            f"lengths above {longest:,} are cut to {longest:,}: the context holds {context_length:,} tokens, "
            f"{new_tokens:,} of them new"
        )
    return list(dict.fromkeys(min(length, longest) for length in lengths))


def _measure(session: Session, length: int, batch: int, new_tokens: int, repeats: int) -> _Times:
    random = np.random.default_rng(0)
    prompts: list[list[int]] = random.integers(session.model.vocab_size, size=(batch, length)).tolist()
    runs = [_run(session, prompts, new_tokens) for _ in range(1 + repeats)][1:]  # the first one warms up
    return _Times(length, batch, [prefill_s for prefill_s, _ in runs], [decode_s for _, decode_s in runs])


def _run(session: Session, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """Return the seconds of a prefill and of ``new_tokens`` greedy steps behind it."""
    cache = session.new_cache(len(prompts), min(session.model.context_length, len(prompts[0]) + new_tokens))
    started = time.perf_counter()
    cache.prefill(prompts, never)
    read = time.perf_counter()
    for _ in range(new_tokens):
        cache.decode(cache.logits.argmax(axis=1).tolist(), never)
    return read - started, time.perf_counter() - read


def _to_row(times: _Times, new_tokens: int, model: ModelConfig, precision: str, read_gb_per_s: float) -> Row:
    prefill = sorted(times.batch * times.context_tokens / seconds for seconds in times.prefill_s)
    decode = sorted(times.batch * new_tokens / seconds for seconds in times.decode_s)
    middle = statistics.median(decode)
    mb_per_step = _mb_per_step(model, precision, times.batch, times.context_tokens + (new_tokens + 1) / 2)
    gb_per_s = mb_per_step / 1e3 * middle / times.batch
    return Row(
        context_tokens=times.context_tokens,
        batch=times.batch,
        prefill_tokens_per_s=statistics.median(prefill),
        prefill_tokens_per_s_min=prefill[0],
        prefill_tokens_per_s_max=prefill[-1],
        decode_tokens_per_s=middle,
        decode_tokens_per_s_min=decode[0],
        decode_tokens_per_s_max=decode[-1],
        mb_per_step=mb_per_step,
        bandwidth_share=gb_per_s / read_gb_per_s,
    )


def _mb_per_step(model: ModelConfig, precision: str, batch: int, length: float) -> float:
    """Return what a decode step reads: every matrix once, and the keys and values of ``length`` tokens of each row.

    Computed from the model's sizes: 12 D^2 weights a layer and the output head, each at its precision, with a float32
    scale and a float32 sum, which onnxruntime adds, for each 64 weights of int8 and 256 of int4 (fewer in narrow
    layers); float16 and bfloat16 weights are float32 in memory. Of a large head of int8 it reads 4 bits. A small head
    that is tied to the token table has 8 bits at int4, too, and is counted as if it had 4.
    Left out are single rows, of the embedding tables and of such a large head, and norms and biases, under 0.1 %.
    """
    weights, head = model.n_layers * 12 * model.emb_dim**2, model.emb_dim * model.n_outputs
    head_precision = "int4" if precision == "int8" and head >= LARGE_HEAD else precision
    read = weights * _WEIGHT_BYTES[precision] + head * _WEIGHT_BYTES[head_precision]
    cached = 2 * model.n_layers * model.n_heads * model.cache_width * _CACHE_BYTES[precision]
    return (read + batch * length * cached) / 1e6


def _read_gb_per_s(threads: int) -> float:
    """Return the memory bandwidth of reading, the best of several tries; sums of integers cost least beside it."""
    parts = [np.ones(_BUFFER_BYTES // 8 // threads, np.int64) for _ in range(threads)]
    workers = [Worker() for _ in parts]
    return max(_sum_gb_per_s(workers, parts) for _ in range(8))


def _sum_gb_per_s(workers: list[Worker], parts: list[NDArray[np.int64]]) -> float:
    started = time.perf_counter()
    for call in [worker.start(part.sum) for worker, part in zip(workers, parts, strict=True)]:
        call.result()
    return sum(part.nbytes for part in parts) / 1e9 / (time.perf_counter() - started)


def _peak_rss_mb() -> float | None:
    if sys.platform == "win32":
        return None
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def to_json(done: Bench) -> str:
    """One object."""
    return json.dumps(asdict(done)) + "\n"


def to_csv(done: Bench) -> str:
    """One line for each row, the same facts of bundle and machine in each."""
    facts = {name: value for name, value in asdict(done).items() if name != "rows"}
    text = io.StringIO()
    writer = csv.DictWriter(text, [*facts, *(field.name for field in fields(Row))], lineterminator="\n")
    writer.writeheader()
    writer.writerows(facts | asdict(row) for row in done.rows)
    return text.getvalue()


def to_markdown(done: Bench) -> str:
    """A table for people: medians with the least and the most in brackets."""
    rss = "" if done.peak_rss_mb is None else f", peak RSS {done.peak_rss_mb:,.0f} MB"
    lines = [
        f"{done.bundle}: {done.precision}, {done.provider}, {done.threads} threads, load {done.load_s:.2f} s{rss}; "
        f"memory is read at {done.read_gb_per_s:.1f} GB/s; medians (min-max) of {done.repeats} runs, "
        f"{done.new_tokens} new tokens",
        "",
        "| context tokens | batch | prefill tokens/s | decode tokens/s | MB read a step | share of bandwidth |",
        "|---:|---:|---:|---:|---:|---:|",
    ]
    for row in done.rows:
        prefill = _spread(row.prefill_tokens_per_s, row.prefill_tokens_per_s_min, row.prefill_tokens_per_s_max)
        decode = _spread(row.decode_tokens_per_s, row.decode_tokens_per_s_min, row.decode_tokens_per_s_max)
        lines.append(
            f"| {row.context_tokens:,} | {row.batch} | {prefill} | {decode} | {row.mb_per_step:,.1f} "
            f"| {row.bandwidth_share:.0%} |"
        )
    return "\n".join(lines) + "\n"


def _spread(median: float, low: float, high: float) -> str:
    return f"{median:,.1f} ({low:,.1f}-{high:,.1f})"


def check_plot(path: Path) -> None:
    """Raise :class:`InputError` where :func:`write_plot` could not write this file."""
    if path.suffix not in PLOT_SUFFIXES:
        raise InputError(f"cannot plot into {path}: give a name that ends in {' or '.join(PLOT_SUFFIXES)}")
    if not path.parent.is_dir():
        raise InputError(f"cannot plot into {path}: there is no folder {path.parent}: make it")
    try:
        path = path.resolve()  # a link stays
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise _cannot_plot(path, error) from error
    _import_figure()


def write_plot(done: Bench, path: Path) -> None:
    """Draw decode speed against context length, a line for each batch, with the least and the most as bars."""
    figure = _import_figure()(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for batch in dict.fromkeys(row.batch for row in done.rows):
        rows = sorted((row for row in done.rows if row.batch == batch), key=lambda row: row.context_tokens)
        speeds = np.array([row.decode_tokens_per_s for row in rows])
        low = speeds - [row.decode_tokens_per_s_min for row in rows]
        high = [row.decode_tokens_per_s_max for row in rows] - speeds
        lengths = [row.context_tokens for row in rows]
        axes.errorbar(lengths, speeds, [low, high], marker="o", capsize=3, label=f"batch {batch}")
    axes.set(xlabel="context tokens", ylabel="decode tokens/s", ylim=(0, None))
    axes.set_title(f"{done.bundle}, {done.precision}", parse_math=False)
    axes.legend()
    image = io.BytesIO()  # what cannot be drawn leaves the file as it was
    try:
        figure.savefig(image, format=path.suffix[1:])
        path.write_bytes(image.getvalue())
    except OSError as error:
        raise _cannot_plot(path, error) from error


def _cannot_plot(path: Path, error: OSError) -> InputError:
    return InputError(f"cannot plot into {path} ({error.strerror}): give another name")


def _import_figure() -> Any:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells of caches it makes or has no room for
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError('a plot needs matplotlib, which is not installed: pip install "gptedge[bench]"') from error
    except ValueError as error:
        raise InputError(f"matplotlib does not load, {str(error)[:100]}: correct MPLBACKEND") from error
    return Figure
