"""The bundle's graphs for other programs: forward, model and generate; only ``verify`` runs them here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import MANIFEST, Bundle, GraphSpec, ModelConfig, TensorSpec
from .cache import Logits
from .errors import BundleError
from .limits import TimeLimit
from .ort import compare_graphs, import_onnxruntime, open_graph, run_error, run_options
from .workers import in_worker

Feeds = dict[str, NDArray[Any]]


def forward_contract(model: ModelConfig) -> GraphSpec:
    """Return the input and output that forward.onnx must have for a model of these sizes."""
    tokens = ("batch_size", "sequence_length")
    logits = TensorSpec("logits", "float32", (*tokens, model.n_outputs))
    return GraphSpec("", (TensorSpec("input_ids", "int64", tokens),), (logits,))


def model_contract(model: ModelConfig) -> GraphSpec:
    """Return the inputs and outputs that model.onnx must have for a model of these sizes."""
    tokens = ("batch_size", "sequence_length")
    past = ("batch_size", model.n_heads, "past_sequence_length", model.head_dim)
    present = ("batch_size", model.n_heads, "total_sequence_length", model.head_dim)
    names = model.cache_names
    inputs = [
        TensorSpec("input_ids", "int64", tokens),
        TensorSpec("attention_mask", "int64", ("batch_size", "total_sequence_length")),
        TensorSpec("position_ids", "int64", tokens),
        *(TensorSpec(f"past_key_values.{name}", "float32", past) for name in names),
    ]
    outputs = [
        TensorSpec("logits", "float32", (*tokens, model.n_outputs)),
        *(TensorSpec(f"present.{name}", "float32", present) for name in names),
    ]
    return GraphSpec("", tuple(inputs), tuple(outputs))


def generate_contract(_: ModelConfig) -> GraphSpec:
    """Return the inputs and output that generate.onnx must have for any model."""
    tokens = ("batch_size", "sequence_length")
    inputs = [
        TensorSpec("input_ids", "int64", tokens),
        TensorSpec("attention_mask", "int64", tokens),
        TensorSpec("max_new_tokens", "int64", ()),
        TensorSpec("eos_token_id", "int64", ()),
    ]
    return GraphSpec("", tuple(inputs), (TensorSpec("output_ids", "int64", ("batch_size", "total_sequence_length")),))


CONTRACTS = {"forward": forward_contract, "generate": generate_contract, "model": model_contract}


class Graph:
    """A graph of the bundle, checked against its contract; no kernel of it rounds its inputs."""

    def __init__(self, bundle: Bundle, name: str, threads: int, timeout_s: float | None) -> None:
        if name not in CONTRACTS:
            raise BundleError(f"{MANIFEST} lists a graph {name}, which this gptedge does not know: upgrade gptedge")
        self.name = name
        self.model = bundle.model
        self._timeout_s = timeout_s
        compare_graphs(f"{MANIFEST}: {bundle.graphs[name].path}", bundle.graphs[name], CONTRACTS[name](bundle.model))
        self._ort = import_onnxruntime()
        self._session = open_graph(bundle, bundle.graphs[name], threads, packed=False)

    def run(self, feeds: Feeds) -> Feeds:
        """Return the outputs by name."""
        options = run_options(self._ort)
        return in_worker(lambda: self._run(feeds, options), options, TimeLimit(self._timeout_s))

    def _run(self, feeds: Feeds, options: Any) -> Feeds:
        names = [output.name for output in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, feeds, options), strict=True))
        except Exception as error:  # onnxruntime's own share no other base class
            raise run_error(error, f"the graph {self.name}") from error


def forward_logits(graph: Graph, ids: list[int]) -> Logits:
    """Return logits float32 (T, V)."""
    return _logits(graph, graph.run({"input_ids": np.array([ids], np.int64)}), len(ids))


def model_logits(graph: Graph, ids: list[int], n_first: int) -> Logits:
    """Return logits float32 (T, V); the ids after the first ``n_first`` are read in a second run, with a past."""
    names = graph.model.cache_names
    past = {name: np.zeros((1, graph.model.n_heads, 0, graph.model.head_dim), np.float32) for name in names}
    parts = []
    for start, stop in ((0, min(n_first, len(ids))), (n_first, len(ids))):
        if start < stop:
            outputs = graph.run(_model_feeds(ids, start, stop, past))
            past = {name: outputs[f"present.{name}"] for name in names}
            parts.append(_logits(graph, outputs, stop - start))
    return np.concatenate(parts)


def generated_ids(graph: Graph, ids: list[int], max_new_tokens: int) -> list[int]:
    """Return the ids that follow these ones."""
    row = np.array([ids], np.int64)
    feeds = {
        "input_ids": row,
        "attention_mask": np.ones_like(row),
        "max_new_tokens": np.array(max_new_tokens, np.int64),
        "eos_token_id": np.array(-1, np.int64),
    }
    new_ids: list[int] = graph.run(feeds)["output_ids"].ravel()[len(ids) :].tolist()
    return new_ids


def _model_feeds(ids: list[int], start: int, stop: int, past: Feeds) -> Feeds:
    feeds: Feeds = {f"past_key_values.{name}": array for name, array in past.items()}
    feeds["input_ids"] = np.array([ids[start:stop]], np.int64)
    feeds["attention_mask"] = np.ones((1, stop), np.int64)
    feeds["position_ids"] = np.arange(start, stop)[None]
    return feeds


def _logits(graph: Graph, outputs: Feeds, length: int) -> Logits:
    logits: Logits = outputs["logits"]
    if logits.shape != (1, length, graph.model.n_outputs):  # onnxruntime does not hold a graph to its own shapes
        raise BundleError(f"the graph {graph.name} answers in another shape than it says: export the bundle again")
    row: Logits = logits[0]
    return row
