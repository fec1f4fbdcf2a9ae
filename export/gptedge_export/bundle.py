"""Write a bundle: graphs, weights, tokenizer, companions, proof, and last the manifest that names every file."""

import copy
import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx_ir as ir
from gptedge_models import GPTModel
from gptedge_runtime.bundle import PRECISIONS
from gptedge_runtime.ort import import_onnxruntime
from tqdm import tqdm

from . import weights
from .answers import known_answers
from .atomic import atomic_folder
from .classifier import Classifier, is_classifier
from .companions import companions
from .cuda import CUDA_DTYPES
from .errors import ExportError
from .loop import fold_weights, generate_graph
from .precision import Prepared, prepare
from .quality import Quality, measure, sample_texts
from .reshapes import drop_reshapes
from .rows import compute_by_row
from .shortlist import look_twice
from .trace import GRAPHS, trace
from .verify import Check, verify, verify_prefill
from .vocabulary import Vocabulary

DEFAULT_OPSET = 20
"""The lowest opset with Gelu as one operator; ONNX Runtime reads it since 1.18 (docs/performance.md)."""

OPSETS = range(18, 24)
"""18 brings LayerNormalization; above 23 the exporter writes what ONNX Runtime 1.23 does not read."""


PRODUCERS = ("gptedge", "torch", "onnx", "onnxscript", "onnx-ir")


@dataclass(frozen=True)
class Report:
    """What an export proved: the comparisons, what the precision costs (None: nothing), and the bundle's size."""

    path: Path
    precision: str
    checks: list[Check]
    quality: Quality | None

    @property
    def size_bytes(self) -> int:
        """Size of the finished bundle."""
        return sum(path.stat().st_size for path in self.path.rglob("*") if path.is_file())

    @property
    def worst(self) -> Check:
        """The comparison nearest to its bound."""
        return max(self.checks, key=lambda check: check.max_abs_diff / check.bound)

    @property
    def top1_agreement(self) -> float:
        """Share of positions, over all comparisons, at which graph and model choose the same token."""
        total = sum(check.batch_size * check.length for check in self.checks)
        return sum(check.top1_agreement * check.batch_size * check.length for check in self.checks) / total


def export_bundle(
    model: GPTModel,
    out: Path | str,
    *,
    vocabulary: Vocabulary,
    precision: str = "fp32",
    calibration: str | None = None,
    opset: int = DEFAULT_OPSET,
    force: bool = False,
    progress: bool = False,
    template: str | None = None,
    classifier: Classifier | None = None,
    cuda: bool = False,
) -> Report:
    """Export ``model`` as the bundle ``out``, verified against the model, and put it in place in one step.

    ``precision`` is one of fp32, fp16, bf16, int8 and int4. ``calibration`` is a text as the model knows it: rounding
    is fitted to one half of it and judged on the other, in the place of the demo model's stories. ``template``: what an
    instruction model expects around ``{prompt}``; ``classifier``: needed if the model is one. ``cuda`` adds the
    graph that the runtime uses on a GPU, for fp32, fp16 and bf16. The same model, vocabulary and versions give the same
    bytes. Raises :class:`ExportError` where the arguments do not fit or ``out`` cannot be written, and
    :class:`ParityError`, with ``out`` untouched, where a graph does not agree.
    """
    out = Path(out)
    if opset not in OPSETS:
        raise ExportError(f"opset {opset} is not supported: choose from {OPSETS.start} to {OPSETS.stop - 1}")
    if precision not in PRECISIONS:
        raise ExportError(f"precision {precision!r} is unknown: choose {', '.join(PRECISIONS)}")
    if calibration is not None and precision == "fp32":
        raise ExportError(
            "a calibration text is given, and fp32 rounds nothing: choose another precision, or leave it out"
        )
    if is_classifier(model) and precision != "fp32":
        raise ExportError(f"the model is a classifier, which has no precision {precision}: take fp32")
    if cuda and precision not in CUDA_DTYPES:
        raise ExportError(f"precision {precision} has no graph for CUDA: take fp16, bf16 or fp32, or leave --cuda out")
    if vocabulary.size > model.config.vocab_size:
        raise ExportError(
            f"the tokenizer has {vocabulary.size:,} tokens, the model only {model.config.vocab_size:,}: "
            f"give the tokenizer of this model with --tokenizer"
        )
    if is_classifier(model) != (classifier is not None):
        raise ExportError(
            "the model is a classifier, and no classes are given: give a Classifier"
            if classifier is None
            else "classes are given, and the model is no classifier: leave them out"
        )
    model.eval()
    with atomic_folder(out, replace=force) as folder:
        texts, held_out = ([], []) if precision == "fp32" else sample_texts(vocabulary, model.config, calibration)
        prepared = prepare(model, precision, texts, progress=progress)
        optional = {"decode_cuda": cuda, "prefill": prepared.store_prefill is not None}
        wanted = [name for name in GRAPHS if optional.get(name, True)]
        graphs = _write_graphs(prepared, folder, wanted, precision, opset, progress)
        with prepared.as_computed():
            checks = verify(
                prepared.model, folder, precision=precision, rough_head=prepared.rough_head, progress=progress
            )
        if "prefill" in graphs:
            checks += verify_prefill(prepared, folder, precision=precision, progress=progress)
        answers = known_answers(prepared, precision)
        name = "the stories" if calibration is None else "the calibration text"
        quality = None if precision == "fp32" else measure(model, folder, precision, held_out, name)
        report = Report(out, precision, checks, quality)
        _write_files(model, folder, vocabulary, report, answers)
        extras: dict[str, Any] = {} if template is None else {"prompt_template": template}
        extras |= {} if classifier is None else {"classifier": asdict(classifier)}
        _write_manifest(model, folder, vocabulary, graphs, precision, opset, extras)
    return report


def _write_graphs(
    prepared: Prepared, folder: Path, wanted: list[str], precision: str, opset: int, progress: bool
) -> dict[str, ir.Model]:
    (folder / "onnx").mkdir()
    graphs: dict[str, ir.Model] = {}
    for name in tqdm(wanted, desc="export", unit=" graphs", disable=not progress, leave=False):
        graph = _trace(prepared, name, precision, opset)
        if name == "model" and not is_classifier(prepared.model):
            graphs["generate"] = generate_graph(graph.clone(), prepared.model.config)
            _store_weights(prepared, "generate", graphs["generate"], precision)
        graphs[name] = graph
        _store_weights(prepared, name, graph, precision)
    weights.save(graphs, folder / "onnx")
    return graphs


def _trace(prepared: Prepared, name: str, precision: str, opset: int) -> ir.Model:
    if name == "decode_cuda":
        return trace(copy.deepcopy(prepared.model).to(CUDA_DTYPES[precision]), name, opset)
    return trace(prepared.model, name, opset, prepared.int8_cache)


def _store_weights(prepared: Prepared, name: str, graph: ir.Model, precision: str) -> None:
    if name == "decode_cuda":
        return  # it was traced with them
    if name == "prefill" and prepared.store_prefill is not None:
        prepared.store_prefill(graph)
        return
    prepared.store(graph)
    fold_weights(graph)
    if name == "decode" and precision == "int4":
        compute_by_row(graph, prepared.model.config.emb_dim)
    elif name == "decode" and precision == "int8":
        drop_reshapes(graph)
    if name == "decode" and prepared.rough_head is not None:
        look_twice(graph, prepared.rough_head)


def _write_files(
    model: GPTModel, folder: Path, vocabulary: Vocabulary, report: Report, answers: dict[str, Any]
) -> None:
    (folder / "tokenizer.tiktoken").write_bytes(vocabulary.to_tiktoken())
    documents = companions(model.config, vocabulary)
    if is_classifier(model):  # other tools would take it for a model that generates
        documents = {name: document for name, document in documents.items() if name.startswith("tokenizer")}
    documents["known_answers.json"] = answers
    documents["export_report.json"] = {
        "precision": report.precision,
        "versions": {name: version(name) for name in PRODUCERS} | {"onnxruntime": import_onnxruntime().__version__},
        "size_bytes": {path.name: path.stat().st_size for path in sorted((folder / "onnx").iterdir())},
        "worst": report.worst.to_dict(),
        "top1_agreement": report.top1_agreement,
        "quality": None if report.quality is None else asdict(report.quality),
        "checks": [check.to_dict() for check in report.checks],
    }
    for name, document in documents.items():
        _write_json(folder / name, document)
    (folder / "README.md").write_text(_card(model, report), "utf-8")


def _write_manifest(
    model: GPTModel,
    folder: Path,
    vocabulary: Vocabulary,
    graphs: dict[str, ir.Model],
    precision: str,
    opset: int,
    extras: dict[str, Any],
) -> None:
    config = model.config.to_dict()
    del config["drop_rate"]  # a matter of training
    document = {
        "format_version": 1,
        "gptedge_version": version("gptedge"),
        "model": config,
        "precision": precision,
        "opset": opset,
        "graphs": {
            name: {
                "path": f"onnx/{name}.onnx",
                "inputs": [_signature(value) for value in graph.graph.inputs],
                "outputs": [_signature(value) for value in graph.graph.outputs],
            }
            for name, graph in graphs.items()
        },
        "tokenizer": {
            "path": "tokenizer.tiktoken",
            "pattern": vocabulary.pattern,
            "special_tokens": dict(vocabulary.special_tokens),
            "eos_token_id": vocabulary.eos_token_id,
        },
        "known_answers": {"path": "known_answers.json"},
        "files": [_entry(path, folder) for path in sorted(folder.rglob("*")) if path.is_file()],
        **extras,
    }
    _write_json(folder / "manifest.json", document)


def _signature(value: ir.Value) -> dict[str, Any]:
    assert value.dtype is not None
    assert value.shape is not None
    shape = [dim if isinstance(dim, int) else str(dim) for dim in value.shape]
    return {"name": value.name, "dtype": str(value.dtype.numpy()), "shape": shape}


def _entry(path: Path, folder: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"path": path.relative_to(folder).as_posix(), "size": path.stat().st_size, "sha256": digest}


def _write_json(path: Path, document: Any) -> None:
    indent = None if path.name == "tokenizer.json" else 2  # 50,000 merges, a line each, would double it
    text = json.dumps(document, indent=indent, sort_keys=True, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", "utf-8")


def _card(model: GPTModel, report: Report) -> str:
    config, worst = model.config, report.worst
    parameters = sum(parameter.numel() for parameter in model.parameters())
    rounded, cost = "", ""
    if (quality := report.quality) is not None:
        rounded = f", rounded as {report.precision} is,"
        cost = (
            f"Beside the model as it was, on {quality.tokens:,} tokens of {quality.text}: the same next token after "
            f"{quality.top1_agreement:.2%}, logits at most {quality.max_abs_diff:.2g} apart.\n"
        )
    return f"""# GPT, {parameters:,} parameters, {report.precision}

{config.n_layers} layers, {config.n_heads} heads, width {config.emb_dim}, context {config.context_length} tokens, \
vocabulary {config.vocab_size}.

    gptedge {"classify" if is_classifier(model) else "generate"} . "Hello, I am"

Held against the PyTorch model{rounded} in {len(report.checks)} comparisons at export; in the one nearest to its bound \
the logits differ by {worst.max_abs_diff:.2g} (bound {worst.bound:.2g}).
{cost}All figures are in `export_report.json`. `gptedge verify .` checks every file and the stored answers again.
"""
