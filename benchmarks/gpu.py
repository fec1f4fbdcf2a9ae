"""gptedge and its peers on a GPU: gpu.py WORK --output FOLDER [--batches 1,8,32,128] [--precisions fp16,bf16,fp32].

The model has the sizes of GPT-2 124M and random weights of a fixed seed; WORK keeps its bundles for the next run. All
engines run in this process, in turns A B C A B C; medians with the least and the most go into FOLDER/gpu.md and
gpu.json. Nothing is installed, and an engine that cannot run is listed with its reason. ``--device cpu --tiny`` tries
the program where there is no GPU; its figures mean nothing.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import onnxruntime
import torch
from gptedge_export import export_bundle
from gptedge_export.hugging_face import export_hugging_face
from gptedge_export.vocabulary import Vocabulary
from gptedge_models import CONFIGS, GPTConfig, GPTModel
from gptedge_runtime.provider import why_not_cuda
from gpu_engines import ENGINES, Engine, random_rows

SEED = 123
TINY = GPTConfig(vocab_size=300, context_length=256, emb_dim=64, n_heads=4, n_layers=2, drop_rate=0.0)
WARM_UP_STEPS = 5  # in which engines compile, capture and take memory
BASE = "torch eager"
BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
PACKAGES = ("gptedge", "onnxruntime-gpu", "onnxruntime-genai-cuda", "torch", "transformers")


@dataclass
class Series:
    """One engine at one precision and batch: seconds of each round, or the reason why there are none."""

    engine: str
    precision: str
    batch: int
    prefill_s: list[float]
    step_s: list[float]
    agreement: float | None = None
    reason: str | None = None


def write_model(work: Path, config: GPTConfig, precisions: list[str]) -> GPTModel:
    """Return the model, after writing its bundles and its Hugging Face folder where they are missing."""
    torch.manual_seed(SEED)
    model = GPTModel(config).eval()
    letters = [bytes([byte]) for byte in range(256)]
    pairs = [left + right for left in letters for right in letters]
    vocabulary = Vocabulary((letters + pairs)[: config.vocab_size - 1], {"<|endoftext|>": config.vocab_size - 1})
    for precision in precisions:
        if not (work / f"bundle-{precision}").exists():
            export_bundle(model, work / f"bundle-{precision}", vocabulary=vocabulary, precision=precision, cuda=True)
    if not (work / "hf").exists():
        export_hugging_face(model, work / "hf", vocabulary=vocabulary)
    return model


def time_round(engine: Engine, one: Series, config: GPTConfig, context: int, steps: int) -> list[int]:
    """Add a round's times to a series; return the first new ids."""
    rows, capacity = random_rows(config, one.batch, context), context + WARM_UP_STEPS + steps + 1
    first_ids = engine.prefill(rows, capacity)  # once more unmeasured: what a shape needs is built here
    for _ in range(WARM_UP_STEPS):
        engine.step()
    started = time.perf_counter()
    engine.prefill(rows, capacity)
    one.prefill_s.append(time.perf_counter() - started)
    for _ in range(WARM_UP_STEPS):
        engine.step()
    started = time.perf_counter()
    for _ in range(steps):
        engine.step()
    one.step_s.append((time.perf_counter() - started) / steps)
    return first_ids


def measure(args: argparse.Namespace, model: GPTModel) -> list[Series]:
    series: list[Series] = []
    for precision in args.precisions:
        for batch in args.batches:
            block = measure_block(args, model, precision, batch)
            series += block.values()
            for one in block.values():
                print(line(one, block.get(BASE), model.config, args, 1.0), flush=True)
    return series


def measure_block(args: argparse.Namespace, model: GPTModel, precision: str, batch: int) -> dict[str, Series]:
    """Return the times of all engines, opened anew, at one precision and batch."""
    block = {name: Series(name, precision, batch, [], []) for name in args.only}
    engines: dict[str, Engine] = {}
    first: dict[str, list[int]] = {}
    for name, one in block.items():
        try:
            engines[name] = ENGINES[name](args.work, model, precision, args.device)
        except Exception as error:
            one.reason = reason(error)
    for _ in range(args.rounds):
        for name, engine in engines.items():
            if block[name].reason is None:
                try:
                    first[name] = time_round(engine, block[name], model.config, args.context, args.steps)
                except Exception as error:
                    block[name].reason = reason(error)
    for name, ids in first.items():
        if BASE in first:
            same = [a == b for a, b in zip(ids, first[BASE], strict=True)]
            block[name].agreement = sum(same) / len(same)
    return block


def reason(error: Exception) -> str:
    text = " ".join(str(error).split())[:120].replace("|", "/")
    return f"{type(error).__name__}: {text}"


def bytes_per_step(config: GPTConfig, precision: str, batch: int, length: float) -> float:
    """Every matrix once, and the keys and values of each row."""
    weights = config.n_layers * 12 * config.emb_dim**2 + config.emb_dim * config.vocab_size
    return BYTES[precision] * (weights + batch * length * 2 * config.n_layers * config.emb_dim)


def copy_bytes_per_s(device: str) -> float:
    """Read and written by the best of several copies within the device's memory."""
    source = torch.ones((1 << 30 if device == "cuda" else 1 << 26), dtype=torch.uint8, device=device)
    target, best = torch.empty_like(source), 0.0
    for _ in range(10):
        started = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 2 * len(source) / (time.perf_counter() - started))
    return best


HEADER = (
    "| | precision | batch | decode, tokens/s | ms a step | share of bandwidth | prefill, tokens/s "
    "| beside torch eager | same first ids |"
)


def line(one: Series, base: Series | None, config: GPTConfig, args: argparse.Namespace, bandwidth: float) -> str:
    start = f"| {one.engine} | {one.precision} | {one.batch} "
    if one.reason is not None:
        return f"{start}| {one.reason} | | | | | |"
    step_s = statistics.median(one.step_s)
    length = args.context + WARM_UP_STEPS + args.steps / 2
    share = bytes_per_step(config, one.precision, one.batch, length) / step_s / bandwidth
    beside = statistics.median(base.step_s) / step_s if base is not None and base.step_s else None
    cells = [
        spread([one.batch / seconds for seconds in one.step_s]),
        f"{1000 * step_s:.3f}",
        f"{share:.0%}" if bandwidth > 1 else "",
        spread([one.batch * args.context / seconds for seconds in one.prefill_s]),
        f"{beside:.2f}x" if beside is not None else "",
        f"{one.agreement:.0%}" if one.agreement is not None else "",
    ]
    return f"{start}| {' | '.join(cells)} |"


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f})"


def report(series: list[Series], config: GPTConfig, args: argparse.Namespace) -> Iterator[str]:
    bandwidth = copy_bytes_per_s(args.device)
    card = torch.cuda.get_device_name() if args.device == "cuda" else f"no GPU ({platform.machine()})"
    yield f"{card}: memory is copied at {bandwidth / 1e9:,.0f} GB/s (read and written); medians (least-most) of "
    yield f"{args.rounds} rounds; {args.steps} steps behind prompts of {args.context} tokens. Every engine brings"
    yield "the ids of each step to the host. TF32 is off. Same first ids: beside torch eager at the same precision."
    yield ""
    yield HEADER
    yield "|---" * (HEADER.count("|") - 1) + "|"
    bases = {(one.precision, one.batch): one for one in series if one.engine == BASE}
    for one in series:
        yield line(one, bases.get((one.precision, one.batch)), config, args, bandwidth)
    yield ""
    yield f"{config.n_layers} layers, width {config.emb_dim}, vocabulary {config.vocab_size:,}; Python " + ", ".join(
        [platform.python_version(), f"onnxruntime {onnxruntime.__version__}", *map(installed, PACKAGES)]
    )


def installed(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} missing"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--batches", type=whole_numbers, default=[1, 8, 32, 128], help="rows at a time")
    parser.add_argument("--precisions", type=lambda text: text.split(","), default=["fp16", "bf16", "fp32"])
    parser.add_argument("--only", type=lambda text: text.split(";"), default=[*ENGINES], help="names between ;")
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="a model to try the program with")
    return parser.parse_args(arguments)


def whole_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    args = parse()
    if args.device == "cuda" and (obstacle := why_not_cuda()):
        raise SystemExit(f"error: {obstacle}")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans each new length for tens of milliseconds
    config = TINY if args.tiny else CONFIGS["gpt2-small"]
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.mkdir(parents=True, exist_ok=True)
    series = measure(args, write_model(args.work, config, args.precisions))
    (args.output / "gpu.json").write_text(json.dumps([asdict(one) for one in series], indent=1) + "\n", "utf-8")
    text = "\n".join(report(series, config, args)) + "\n"
    (args.output / "gpu.md").write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
