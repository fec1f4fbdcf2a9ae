"""The command ``gptedge``: text on stdout and nothing else, one line on stderr when something is wrong."""

import contextlib
import json
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path

import click

from .batch import Job, answer_here, run_batch
from .batch_ray import answer_by_ray
from .batch_rows import Defaults
from .bench import bench, check_plot, to_csv, to_json, to_markdown, write_plot
from .bundle import MANIFEST, Bundle, open_bundle
from .classify import load_classifier
from .command import run, say, write
from .errors import InputError
from .evaluate import evaluate
from .generate import Sampling
from .gpt import DEFAULT_NEW_TOKENS, GPT, load
from .provider import offers_cuda, why_not_cuda
from .stream import TextStream
from .texts import read_prompt, read_text
from .verify import verify
from .web import Server, site, write_site

_threads = click.option("--threads", type=int, help="At most the CPUs this process may use, which is the default.")
_timeout_s = click.option(
    "--timeout-s", type=float, help="Give up after computing for this long: for a bundle you do not trust."
)
_on_overflow = click.option(
    "--on-overflow",
    type=click.Choice(["slide", "stop", "error"]),
    default="slide",
    show_default=True,
    help="Past the context length: drop the oldest token, end there, or refuse the prompt before the start.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="gptedge")
def cli() -> None:
    """Generate text from a bundle that export-onnx wrote, without PyTorch."""


@cli.command("generate")
@click.argument("bundle")
@click.argument("prompt", required=False)
@click.option("-f", "--file", metavar="FILE", help="Read the prompt from this file.")
@click.option("-n", "--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, show_default=True, help="Tokens to make.")
@click.option("--template", is_flag=True, help="Put the prompt into the template of an instruction model's bundle.")
@click.option("--stop", metavar="TEXT", help="End before this text.")
@_on_overflow
@click.option("--temperature", type=float, help="Draw tokens instead of taking the most likely: 1 as the model says.")
@click.option("--top-k", type=int, help="Draw from the K most likely tokens.")
@click.option("--top-p", type=float, help="Draw from the most likely tokens that reach probability P together.")
@click.option("--seed", type=int, help="Draw the same tokens again.")
@click.option(
    "--provider",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Device to run on; another one is never taken in its place.",
)
@_threads
@_timeout_s
@click.option("--no-stream", is_flag=True, help="Print the text when it is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: ids, text, reason of the end, times.")
def generate_command(
    bundle: str,
    prompt: str | None,
    file: str | None,
    max_new_tokens: int,
    template: bool,
    stop: str | None,
    on_overflow: str,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    seed: int | None,
    provider: str,
    threads: int | None,
    timeout_s: float | None,
    no_stream: bool,
    as_json: bool,
) -> None:
    """Continue PROMPT, or standard input where PROMPT is missing or "-".

    \b
    gptedge generate build/demo "Once upon a time" -n 40
    echo "Once upon a time" | gptedge generate build/demo
    gptedge generate build/demo "Once upon a time" --temperature 0.8 --top-k 40 --seed 1

    One newline at the end of a file or of standard input is not part of the prompt, nor is a byte order mark.
    On a terminal, control characters in the text are shown as \\x1b and the like.
    """
    text = read_prompt(prompt, file)
    sampling = _sampling(temperature, top_k, top_p, seed)
    progress = sys.stderr.isatty()
    with load(bundle, provider=provider, threads=threads, timeout_s=timeout_s, progress=progress) as gpt:
        if provider == "auto":
            _tell_device(gpt)
        text = gpt.apply_template(text) if template else text
        stream = gpt.stream(text, max_new_tokens=max_new_tokens, stop=stop, on_overflow=on_overflow, sampling=sampling)
        if as_json:
            write(_to_json(stream, gpt.provider))
        elif no_stream:
            write("".join(stream))
        else:
            for piece in stream:
                write(piece)
        write("\n")


@cli.command("batch")
@click.argument("bundle")
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@click.option("-n", "--max-new-tokens", type=int, default=DEFAULT_NEW_TOKENS, show_default=True, help="Tokens a row.")
@click.option("--stop", metavar="TEXT", help="End a row before this text.")
@_on_overflow
@click.option("--batch-size", type=int, default=32, show_default=True, help="Rows that are computed together.")
@click.option("--threads", type=int, help="Of one process: all its CPUs by default, with Ray 1.")
@click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True, help="Where to run.")
@click.option("--ray-address", metavar="ADDRESS", help="A Ray cluster that runs; without it one is started here.")
@click.option("--workers", type=click.IntRange(1), help="Ray's processes; as many as it has CPUs for by default.")
def batch_command(
    bundle: str,
    source: str,
    target: str,
    max_new_tokens: int,
    stop: str | None,
    on_overflow: str,
    batch_size: int,
    threads: int | None,
    engine: str,
    ray_address: str | None,
    workers: int | None,
) -> None:
    """Continue the prompt of each row of IN, a file of JSON lines, and write a row for it to OUT.

    \b
    {"id": 1, "prompt": "Once upon a time", "max_new_tokens": 40, "stop": "."}

    id and prompt are required. OUT has the order of IN. Killed, the same command goes on where it was. A row that
    cannot be answered gets {"id", "error"}. Names that end in .parquet are read and written as Parquet.
    """
    job = Job(bundle, Defaults(max_new_tokens, stop, on_overflow), batch_size=batch_size, threads=threads)
    if engine == "local" and (ray_address is not None or workers is not None):
        raise InputError("--ray-address and --workers are for --engine ray: add it, or leave them out")
    compute = partial(answer_by_ray, address=ray_address, workers=workers) if engine == "ray" else answer_here
    summary = run_batch(job, source, target, engine=compute, progress=sys.stderr.isatty())
    say(f"{target}: {summary}")


@cli.command("verify")
@click.argument("bundle")
@_threads
@_timeout_s
def verify_command(bundle: str, threads: int | None, timeout_s: float | None) -> None:
    """Check the files, graphs and known answers of BUNDLE; exit code 3 where an answer is not the stored one."""
    done = verify(bundle, threads=threads, timeout_s=timeout_s, progress=sys.stderr.isatty())
    for name in done.skipped:
        say(f"note: the graph {name} was not run: bfloat16 needs a GPU")
    click.echo(f"ok: {done.files} files, {done.graphs} graphs, {done.prompts} known answers")


@cli.command("info")
@click.argument("bundle")
def info_command(bundle: str) -> None:
    """Print what BUNDLE holds, after checking its files."""
    for name, value in _facts(open_bundle(bundle)).items():
        write(f"{name:<11} {value}\n")


@cli.command("classify")
@click.argument("bundle")
@click.argument("text", required=False)
@click.option("-f", "--file", metavar="FILE", help="Read the text from this file.")
@_threads
@_timeout_s
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: the label, the probability of each.")
def classify_command(
    bundle: str, text: str | None, file: str | None, threads: int | None, timeout_s: float | None, as_json: bool
) -> None:
    """Print the class of TEXT, or of standard input where TEXT is missing or "-", by a classifier's BUNDLE."""
    content = read_prompt(text, file)
    classifier = load_classifier(bundle, threads=threads, timeout_s=timeout_s, progress=sys.stderr.isatty())
    answer = classifier.classify(content)
    write((json.dumps(asdict(answer), ensure_ascii=False) if as_json else answer.label) + "\n")


@cli.command("eval")
@click.argument("bundle")
@click.argument("text_file")
@click.option("--stride", type=int, help="Tokens by which the window moves on; half the context by default.")
@_threads
@_timeout_s
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def eval_command(
    bundle: str, text_file: str, stride: int | None, threads: int | None, timeout_s: float | None, as_json: bool
) -> None:
    """Print the perplexity of TEXT_FILE: how well BUNDLE predicts its tokens, each from those before it.

    The window is the model's context. A smaller --stride gives each token more context, and takes longer.
    """
    text = read_text(text_file)
    with load(bundle, threads=threads, timeout_s=timeout_s) as gpt:
        done = evaluate(gpt, text, stride=stride, progress=sys.stderr.isatty())
    if as_json:
        click.echo(json.dumps(asdict(done)))
    else:
        click.echo(
            f"perplexity {done.perplexity:,.4f} over {done.tokens:,} tokens, "
            f"window {done.window:,}, stride {done.stride:,}"
        )


@cli.command("bench")
@click.argument("bundle")
@click.option("--lengths", default="64,512,832", show_default=True, help="Tokens of context before the measured steps.")
@click.option("--batch", default="1", show_default=True, help="Rows at a time, such as 1,2,4.")
@click.option("-n", "--new-tokens", type=int, default=32, show_default=True, help="Decode steps behind each context.")
@click.option("--repeats", type=int, default=5, show_default=True, help="Runs of each; one more before them warms up.")
@_threads
@click.option(
    "-o",
    "--output-format",
    type=click.Choice(["md", "json", "csv"]),
    default="md",
    show_default=True,
    help="A table, one JSON object, or a line for each length and batch.",
)
@click.option("--plot", type=click.Path(path_type=Path), metavar="FILE", help="Draw decode speed into a .svg or .png.")
def bench_command(
    bundle: str,
    lengths: str,
    batch: str,
    new_tokens: int,
    repeats: int,
    threads: int | None,
    output_format: str,
    plot: Path | None,
) -> None:
    """Measure how fast BUNDLE reads a prompt (prefill) and writes tokens behind it (decode) on this machine's CPU.

    \b
    gptedge bench build/demo --lengths 64,128
    gptedge bench build/demo --batch 1,2,4 -o csv

    Figures are those of a machine that does nothing else meanwhile.
    """
    if plot is not None:
        check_plot(plot)
    done = bench(
        bundle,
        lengths=_whole_numbers("--lengths", lengths),
        batches=_whole_numbers("--batch", batch),
        new_tokens=new_tokens,
        repeats=repeats,
        threads=threads,
        warn=lambda note: say(f"note: {note}"),
        progress=sys.stderr.isatty(),
    )
    formats = {"md": to_markdown, "json": to_json, "csv": to_csv}
    if plot is not None:
        write_plot(done, plot)
    write(formats[output_format](done))


@cli.command("web")
@click.argument("bundle")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--output", metavar="DIR", help="Write the page to this folder, for any web server, and serve nothing.")
@click.option("--ort", metavar="DIR", help="Where onnxruntime-web's files are, if not in node_modules here or above.")
def web_command(bundle: str, port: int, output: str | None, ort: str | None) -> None:
    """Serve a page that runs BUNDLE in the browser's tab, to this computer only.

    \b
    npm install onnxruntime-web
    gptedge web build/demo
    """
    files = site(open_bundle(bundle), ort)
    if output is not None:
        write_site(files, output)
        click.echo(f"wrote {len(files)} files to {output}")
        return
    with Server(files, port) as server, contextlib.suppress(KeyboardInterrupt):
        click.echo(f"{server.url} (Ctrl+C ends it)")
        server.serve_forever()


def main() -> None:
    """Run the command; exit codes: 0 done, 1 our bug, 2 the user's to fix, 3 verification failed, 130 interrupted."""
    sys.exit(run(cli, "gptedge", sys.argv[1:] or ["--help"]))


def _tell_device(gpt: GPT) -> None:
    """Say on stderr what runs where there was a choice: where the user has installed what could use a GPU."""
    if offers_cuda():
        note = "" if gpt.provider == "cuda" else f", not on cuda: {gpt.why_not_cuda or why_not_cuda()}"
        say(f"note: runs on {gpt.provider}{note}")


def _whole_numbers(option: str, text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise InputError(f"{option} is {text[:40]!r}: give whole numbers with commas between, such as 1,2,4") from error


def _sampling(temperature: float | None, top_k: int | None, top_p: float | None, seed: int | None) -> Sampling | None:
    if temperature is None and top_k is None and top_p is None and seed is None:
        return None
    return Sampling(
        temperature=1.0 if temperature is None else temperature,
        top_k=top_k,
        top_p=1.0 if top_p is None else top_p,
        seed=seed,
    )


def _to_json(stream: TextStream, provider: str) -> str:
    text = "".join(stream)
    speed = stream.tokens_per_s
    answer = {
        "prompt_token_ids": stream.prompt_token_ids,
        "token_ids": stream.token_ids,
        "text": text,
        "finish_reason": stream.finish_reason,
        "provider": provider,
        "prefill_ms": round(stream.prefill_ms, 3),
        "decode_ms": round(stream.decode_ms, 3),
        "tokens_per_s": speed and round(speed, 1),
    }
    return json.dumps(answer, ensure_ascii=False)


def _facts(bundle: Bundle) -> dict[str, str]:
    model, tokenizer = bundle.model, bundle.tokenizer
    files = [MANIFEST, *bundle.files]
    size_mb = sum((bundle.folder / path).stat().st_size for path in files) / 1e6
    return {
        "bundle": str(bundle.folder),
        "size": f"{size_mb:,.1f} MB in {len(files)} files",
        "written by": f"gptedge {bundle.gptedge_version}, opset {bundle.opset}",
        "precision": bundle.precision,
        "model": f"{model.n_layers} layers, {model.n_heads} heads, width {model.emb_dim}",
        "context": f"{model.context_length:,} tokens",
        "vocabulary": f"{model.vocab_size:,} tokens",
        "special": " ".join(tokenizer.special_tokens) or "none",
        "graphs": " ".join(bundle.graphs),
    }
