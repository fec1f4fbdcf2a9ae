"""Proof that the graphs compute what the model computes: ONNX logits against the eager model."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from gptedge_models import GPTConfig, GPTModel
from numpy.typing import NDArray
from tqdm import tqdm

from .errors import ParityError
from .graphs import cache_names

Array = NDArray[Any]

ATOL = 1e-5
RTOL = 2e-5
"""Bound on max|d logits|: ``max(ATOL, RTOL * max|logit|)``. Two sound float32 programs differ by up to 1.1e-5 of the
largest logit, since they add in different orders."""


@dataclass(frozen=True)
class Check:
    """One comparison: where, the largest difference, the bound, and the share of positions with the same top-1."""

    graph: str
    case: str
    batch_size: int
    length: int
    max_abs_diff: float
    bound: float
    top1_agreement: float

    @property
    def passed(self) -> bool:
        """False also where either side is not a number."""
        return self.max_abs_diff <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def lengths(context_length: int) -> list[int]:
    """1, 2, 3, every power of two with its neighbours, the context length and one less."""
    powers = [2**k + d for k in range(2, context_length.bit_length() + 1) for d in (-1, 0, 1)]
    wanted = {1, 2, 3, *powers, context_length - 1, context_length}
    return sorted(n for n in wanted if 1 <= n <= context_length)


class Graph:
    """One ONNX graph under verification, run with the plainest calls there are."""

    def __init__(self, folder: Path, name: str, config: GPTConfig) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry("session.disable_prepacking", "1")  # else the weights are held twice
        path = folder / "onnx" / f"{name}.onnx"
        self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.name = name
        self.config = config

    def run(self, **feeds: Array) -> list[Array]:
        """Logits, then the cache."""
        return list(self._session.run(None, feeds))

    def cache(self, batch_size: int, length: int) -> list[Array]:
        """An empty cache of that length."""
        shape = (batch_size, self.config.n_heads, length, self.config.head_dim)
        return [np.zeros(shape, np.float32) for _ in cache_names("", self.config)]

    def step(self, ids: Array, past: int, cache: list[Array], mask: Array | None = None) -> tuple[Array, list[Array]]:
        """Read ids (B, S) after ``past`` tokens: logits (B, S, V) and the new cache. ``mask`` is for ``model`` alone."""
        batch, new = ids.shape
        positions = np.broadcast_to(np.arange(past, past + new), ids.shape)
        if self.name == "model":
            mask = np.ones((batch, past + new), np.int64) if mask is None else mask
            positions = np.maximum(mask.cumsum(axis=1) - 1, 0)[:, past:]
            feeds = {"attention_mask": mask, "position_ids": positions}
        else:
            feeds = {
                "position_ids": np.ascontiguousarray(positions),
                "seqlens_k": np.full(batch, past + new - 1, np.int32),
                "total_sequence_length": np.array(past + new, np.int32),
                "logit_positions": np.tile(np.arange(new), (batch, 1)),
            }
        named = dict(zip(cache_names("past_key_values", self.config), cache, strict=True))
        logits, *cache = self.run(input_ids=ids, **feeds, **named)
        return logits, cache


def verify(model: GPTModel, folder: Path, *, progress: bool = False) -> list[Check]:
    """Hold every graph in ``folder/onnx`` against the eager model; raises :class:`ParityError` at the first failure."""
    checks: list[Check] = []
    graphs = {name: Graph(folder, name, model.config) for name in ("forward", "model", "decode")}
    bar = tqdm(_cases(model, graphs), desc="verify", unit=" checks", disable=not progress, leave=False)
    for check in bar:
        checks.append(check)
        if not check.passed:
            raise ParityError(
                f"{check.graph}.onnx differs from the model by {check.max_abs_diff:.3g} at {check.case}, batch "
                f"{check.batch_size}, length {check.length}; the bound is {check.bound:.3g}: nothing was written"
            )
    return checks


def _cases(model: GPTModel, graphs: dict[str, Graph]) -> Iterator[Check]:
    context = model.config.context_length
    random = np.random.default_rng(0)

    def draw(batch: int, length: int) -> Array:
        return random.integers(model.config.vocab_size, size=(batch, length))

    shapes = [(1, length) for length in lengths(context)]
    shapes += [(batch, length) for batch in (2, 3) for length in (1, 2, 7, 33) if length <= context]
    for batch, length in shapes:
        ids = draw(batch, length)
        eager = _eager(model, ids)
        yield _compare("forward", "whole sequence", eager, graphs["forward"].run(input_ids=ids)[0])
        for name in ("model", "decode"):
            logits, _ = graphs[name].step(ids, 0, graphs[name].cache(batch, 0 if name == "model" else length))
            yield _compare(name, "prefill", eager, logits)
    for batch, length in ((2, min(24, context)), (1, context)):
        ids = draw(batch, length)
        eager = _eager(model, ids)
        for name in ("model", "decode"):
            yield _compare(name, "step by step", eager, _stepwise(graphs[name], ids))
    if context >= 3:
        yield from _ragged(model, graphs, draw(3, min(21, context)))


def _stepwise(graph: Graph, ids: Array) -> Array:
    """Prefill half, then one token at a time; a single row reads all but the last five of the rest in one step."""
    batch, length = ids.shape
    first_single = max(length - 5, 1) if batch == 1 else length // 2 + 1
    cuts = sorted({length // 2, *range(first_single, length + 1)} - {0})
    cache, parts, past = graph.cache(batch, 0 if graph.name == "model" else length), [], 0
    for cut in cuts:
        logits, cache = graph.step(ids[:, past:cut], past, cache)
        parts.append(logits)
        past = cut
    return np.concatenate(parts, axis=1)


def _ragged(model: GPTModel, graphs: dict[str, Graph], ids: Array) -> Iterator[Check]:
    """Rows of different length in one batch, then one token more each, against the same rows alone."""
    full = ids.shape[1] - 1
    rows = [(row, max(1, full - row * full // 3)) for row in range(len(ids))]
    expected = [_eager(model, ids[row : row + 1, : length + 1])[0, -2:] for row, length in rows]

    padded, mask = np.zeros((len(ids), full), np.int64), np.zeros((len(ids), full), np.int64)
    for row, length in rows:
        padded[row, full - length :], mask[row, full - length :] = ids[row, :length], 1
    following = np.array([[ids[row, length]] for row, length in rows])
    first, cache = graphs["model"].step(padded, 0, graphs["model"].cache(len(ids), 0), mask)
    second, _ = graphs["model"].step(following, full, cache, np.concatenate([mask, np.ones((len(ids), 1), np.int64)], 1))
    yield _compare("model", "left-padded batch", np.stack(expected), np.concatenate([first[:, -1:], second], axis=1))

    padded = np.zeros((len(ids), full), np.int64)
    for row, length in rows:
        padded[row, :length] = ids[row, :length]
    last = np.array([[length - 1] for _, length in rows])
    yield _compare("decode", "ragged batch", np.stack(expected), _decode_ragged(graphs["decode"], padded, last, following))


def _decode_ragged(graph: Graph, padded: Array, last: Array, following: Array) -> Array:
    batch, full = padded.shape
    names = cache_names("past_key_values", graph.config)
    lengths = (last + 1).astype(np.int32)[:, 0]
    first, *cache = graph.run(
        input_ids=padded,
        position_ids=np.tile(np.arange(full), (batch, 1)),
        seqlens_k=lengths - 1,
        total_sequence_length=np.array(full, np.int32),
        logit_positions=last,
        **dict(zip(names, graph.cache(batch, full + 1), strict=True)),
    )
    second, *_ = graph.run(
        input_ids=following,
        position_ids=last + 1,
        seqlens_k=lengths,
        total_sequence_length=np.array(full + 1, np.int32),
        logit_positions=np.zeros((batch, 1), np.int64),
        **dict(zip(names, cache, strict=True)),
    )
    return np.concatenate([first, second], axis=1)


def _eager(model: GPTModel, ids: Array) -> Array:
    with torch.no_grad():
        logits: Array = model(torch.from_numpy(ids)).numpy()
    return logits


def _compare(graph: str, case: str, eager: Array, onnx: Array) -> Check:
    batch, length, _ = eager.shape
    return Check(
        graph=graph,
        case=case,
        batch_size=batch,
        length=length,
        max_abs_diff=float(np.abs(eager - onnx).max()),
        bound=float(max(ATOL, RTOL * np.abs(eager).max())),
        top1_agreement=float((eager.argmax(-1) == onnx.argmax(-1)).mean()),
    )
