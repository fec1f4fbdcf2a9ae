"""The commands ``export-onnx`` and ``export-hf``."""

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import click
from gptedge_models import CONFIGS, CheckpointError, GPTModel, load_checkpoint
from gptedge_models.checkpoint import locate
from gptedge_runtime.bundle import PRECISIONS
from gptedge_runtime.command import run

from .bundle import DEFAULT_OPSET, Report, export_bundle
from .classifier import describe_classifier
from .errors import ExportError
from .hugging_face import export_hugging_face
from .quality import Quality
from .template import load_template
from .vocabulary import Vocabulary, holds_vocabulary, load_vocabulary

_GPT2_VOCAB_SIZES = (50257, 50304)  # the second is filled up to a multiple of 64, which trains faster

EPILOG = """\b
Examples:
  export-onnx demo -o build/demo
  export-onnx random --config gpt2-small --seed 123 -o build/random
  export-onnx model.pth --config gpt2-small --tokenizer gpt2 -o build/mine
  export-onnx gpt2 -o build/gpt2
"""


@click.command(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--config", metavar="NAME|FILE", help=f"Sizes: {', '.join(CONFIGS)}, or the book's dict as JSON.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=123, show_default=True, help="For SOURCE random.")
@click.option(
    "--precision", type=click.Choice([*PRECISIONS]), default="fp32", show_default=True, help="Of the weights."
)
@click.option(
    "--calibration", metavar="FILE", help="A text as the model knows it: int8 and int4 are fitted to half of it."
)
@click.option("--opset", type=int, default=DEFAULT_OPSET, show_default=True, help="ONNX opset of the graphs.")
@click.option(
    "--cuda", is_flag=True, help="Add the graph for NVIDIA GPUs, fp32, fp16 or bf16: gptedge's --provider cuda."
)
@click.option("--tokenizer", metavar="NAME|FILE", help="gpt2, bytes, a .tiktoken file, a tokenizer.json or a folder.")
@click.option("--template", metavar="NAME|FILE", help="Around prompts: alpaca (the book's), or a file with {prompt}.")
@click.option("--labels", metavar="A,B,...", help="For a classifier: the names of its classes, in their order.")
@click.option(
    "--max-length", type=int, metavar="N", help="For a classifier: tokens to which texts are padded; 0: none."
)
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no report and no progress.")
def command(
    source: str,
    output: Path,
    config: str | None,
    seed: int,
    precision: str,
    calibration: str | None,
    opset: int,
    cuda: bool,
    tokenizer: str | None,
    template: str | None,
    labels: str | None,
    max_length: int | None,
    force: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """Export a GPT to an ONNX bundle and prove that it computes what the model computes.

    SOURCE is demo, random (with --config), gpt2 / gpt2-medium / gpt2-large / gpt2-xl or another hub id, or a path to a
    checkpoint.
    """
    started = time.perf_counter()
    text = None if calibration is None else _read_text(calibration)
    frame = None if template is None else load_template(template)
    model, vocabulary = _load(source, config, seed, tokenizer)
    report = export_bundle(
        model,
        output,
        vocabulary=vocabulary,
        precision=precision,
        calibration=text,
        opset=opset,
        force=force,
        progress=sys.stderr.isatty() and not quiet,
        template=frame,
        classifier=describe_classifier(model, vocabulary, labels=labels, max_length=max_length),
        cuda=cuda,
    )
    if as_json:
        click.echo(json.dumps(_summary(report, time.perf_counter() - started)))
    elif not quiet:
        click.echo(_text(report, time.perf_counter() - started))


@click.command("export-hf", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.argument("source")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write; a new one.")
@click.option("--config", metavar="NAME|FILE", help=f"Sizes: {', '.join(CONFIGS)}, or the book's dict as JSON.")
@click.option("--seed", type=click.IntRange(0, 2**63 - 1), default=123, show_default=True, help="For SOURCE random.")
@click.option("--tokenizer", metavar="NAME|FILE", help="gpt2, bytes, a .tiktoken file, a tokenizer.json or a folder.")
def hf_command(source: str, output: Path, config: str | None, seed: int, tokenizer: str | None) -> None:
    """Write a GPT as a Hugging Face GPT-2 folder: config.json, model.safetensors and the tokenizer's files.

    SOURCE is what export-onnx takes.

    \b
    export-hf model.pth --config gpt2-small -o build/mine-hf
    """
    model, vocabulary = _load(source, config, seed, tokenizer)
    export_hugging_face(model, output, vocabulary=vocabulary)
    click.echo(f"{output}: {sum(path.stat().st_size for path in output.iterdir()) / 1e6:,.1f} MB")


def _read_text(file: str) -> str:
    try:
        return Path(file).read_text("utf-8")
    except OSError as error:
        raise ExportError(f"cannot read {file}: {error.strerror}: check the path") from error
    except UnicodeDecodeError as error:
        raise ExportError(f"{file} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error


def _load(source: str, config: str | None, seed: int, tokenizer: str | None) -> tuple[GPTModel, Vocabulary]:
    try:
        path = source if source == "random" else locate(source)
        model = load_checkpoint(path, config=config, seed=seed)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    return model, load_vocabulary(tokenizer or default_tokenizer(Path(path), model))


def default_tokenizer(path: Path, model: GPTModel) -> str:
    """The vocabulary that comes with the checkpoint, else GPT-2's where the model has its size."""
    if holds_vocabulary(path):
        return str(path)
    if model.config.vocab_size in _GPT2_VOCAB_SIZES:
        return "gpt2"
    raise ExportError(f"no tokenizer is known for {model.config.vocab_size:,} tokens: give one with --tokenizer")


def _summary(report: Report, seconds: float) -> dict[str, object]:
    return {
        "bundle": str(report.path),
        "precision": report.precision,
        "checks": len(report.checks),
        "worst": report.worst.to_dict(),
        "top1_agreement": report.top1_agreement,
        "quality": None if report.quality is None else asdict(report.quality),
        "size_bytes": report.size_bytes,
        "export_s": round(seconds, 1),
    }


def _text(report: Report, seconds: float) -> str:
    worst, quality = report.worst, report.quality
    cost = "" if quality is None else "\n" + _cost(quality)
    return (
        f"{report.path}: {report.precision}, {report.size_bytes / 1e6:,.1f} MB, {seconds:.0f} s\n"
        f"parity: {len(report.checks)} comparisons with the model passed; worst max|d logits| {worst.max_abs_diff:.2g} "
        f"(bound {worst.bound:.2g}) in {worst.graph}.onnx, {worst.case}, length {worst.length}\n"
        f"top-1 agreement: {report.top1_agreement:.2%}{cost}"
    )


def _cost(quality: Quality) -> str:
    unjudged = f"not judged, the text {'may go on in many ways' if quality.judged else 'is strange to it'}"
    top1_bound = f"bound {quality.min_top1_agreement:.1%}" if "top1_agreement" in quality.judged else unjudged
    kl_bound = f" (bound {quality.max_kl_nats:g})" if "kl_nats" in quality.judged else ""
    same, behind = ", ".join(map(str, quality.greedy_tokens)), ""
    if quality.top1_agreement_behind_prompts is not None:
        behind = f"; behind a prompt {quality.top1_agreement_behind_prompts:.2%}"
    return (
        f"cost beside fp32, on {quality.tokens:,} tokens of {quality.text}: top-1 agreement "
        f"{quality.top1_agreement:.2%}{behind} ({top1_bound}),\n"
        f"perplexity {quality.perplexity:,.4f} instead of {quality.fp32_perplexity:,.4f}, "
        f"|d logits| max {quality.max_abs_diff:.2g}, mean {quality.mean_abs_diff:.2g}, "
        f"KL {quality.kl_nats:.2g} nats{kl_bound},\n"
        f"the same greedy tokens: {same} of {quality.greedy_tokens_max}"
    )


def main() -> None:
    """Run the command: exit code 0, 1 our bug, 2 the user's mistakes, 3 for failed parity, 130 when interrupted."""
    sys.exit(run(command, "export-onnx", sys.argv[1:]))


def hf_main() -> None:
    """Run ``export-hf``; exit codes as above."""
    sys.exit(run(hf_command, "export-hf", sys.argv[1:]))
