"""Proof that the graphs compute what the model computes: ONNX logits and ids against the eager model."""

import itertools
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gptedge_models import GPTModel
from gptedge_runtime.cuda import HALF_ERROR
from tqdm import tqdm

from .blocks import Blocks, round_activations
from .classifier import is_classifier
from .errors import ParityError
from .graph_run import Array, Graph
from .graphs import IN_PLACE
from .precision import Prepared
from .shortlist import N_BEST, ROUGH_BITS

ATOL = 1e-5
RTOL = {"fp32": 2e-5, "fp16": 2e-5, "bf16": 2e-5, "int8": 0.05, "int4": 0.05}
"""Bound on max|d logits| by precision: ``max(ATOL, RTOL * max|logit|)``. Two sound float32 programs differ by up to
1.1e-5 of the largest logit, since they add in different orders. Where inputs are rounded to 8 bits, such a difference
now and then turns a rounding; what follows from it reaches 0.02, and 0.04 where kernels do not round inputs at all."""

RTOL_CUDA_FP16 = HALF_ERROR["fp16"] * RTOL["fp16"]
"""Of ``decode_cuda`` at fp16, whose activations are float16, too: each of its roundings is up to 0.0005 of a value."""

ACTIVATION_MAX = (63, 127)
"""Whole numbers that ``prefill`` rounds inputs to: the second where the processor's kernels are exact for it."""


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


def verify(
    model: GPTModel,
    folder: Path,
    *,
    precision: str = "fp32",
    rough_head: Blocks | None = None,
    progress: bool = False,
) -> list[Check]:
    """Hold every graph but ``prefill`` in ``folder/onnx`` against the eager model.

    Where ``decode`` looks at a ``rough_head`` first, its logits are those of the one or the other head, and the best
    those of the model's. Raises :class:`ParityError` at the first failure.
    """
    return _all_passed(_cases(Eager(model, rough_head), folder, precision), progress)


def verify_prefill(prepared: Prepared, folder: Path, *, precision: str, progress: bool = False) -> list[Check]:
    """Hold ``prefill``, and ``decode`` behind what it read, against the eager model, as :func:`verify` does."""
    return _all_passed(_prompts(prepared, folder, precision), progress)


def _all_passed(cases: Iterator[Check], progress: bool) -> list[Check]:
    checks: list[Check] = []
    for check in tqdm(cases, desc="verify", unit=" checks", disable=not progress, leave=False):
        checks.append(check)
        if not check.passed:
            raise ParityError(
                f"{check.graph}.onnx differs from the model by {check.max_abs_diff:.3g} at {check.case}, batch "
                f"{check.batch_size}, length {check.length}; the bound is {check.bound:.3g}: nothing was written"
            )
    return checks


def _prompts(prepared: Prepared, folder: Path, precision: str) -> Iterator[Check]:
    model, random, both_heads = prepared.model, np.random.default_rng(4), Eager(prepared.model, prepared.rough_head)
    for length in lengths(model.config.context_length)[2:]:  # of less than two tokens it reads none
        ids = random.integers(model.config.vocab_size, size=(1, length))
        n_prompt = length - min(8, length // 2)
        prefill, decode = (Graph(folder, name, model.config, precision) for name in ("prefill", "decode"))
        for activation_max in ACTIVATION_MAX:
            onnx, is_exact = behind_prompt(prefill, decode, ids, n_prompt, activation_max)
            if is_exact or activation_max < max(ACTIVATION_MAX):
                with prepared.as_computed(n_prompt, activation_max):
                    eager, rough = both_heads(ids, n_prompt)
                case = f"behind a prompt of {n_prompt}, activations up to {activation_max}"
                yield _compare("prefill", case, eager, onnx, RTOL[precision], rough)


def behind_prompt(prefill: Graph, decode: Graph, ids: Array, n_prompt: int, activation_max: int) -> tuple[Array, bool]:
    """Logits (1, T - n_prompt, V) of the last of ids (1, T), which ``decode`` reads in one step.

    ``prefill`` reads the first ``n_prompt`` in two parts, as the runtime reads a long prompt, and tells whether it does
    so exactly on this machine at the largest ``activation_max``.
    """
    buffers, is_exact = decode.cache(*ids.shape), True
    cuts = (0, n_prompt // 2, n_prompt) if n_prompt >= 4 else (0, n_prompt)
    for begin, end in itertools.pairwise(cuts):
        is_exact = prefill.read(ids[:, begin:end], begin, buffers, activation_max)
    return decode.step(ids[:, n_prompt:], n_prompt, buffers)[0], is_exact


def _cases(both_heads: "Eager", folder: Path, precision: str) -> Iterator[Check]:
    model, context = both_heads.model, both_heads.model.config.context_length
    random = np.random.default_rng(0)
    in_place = [name for name in IN_PLACE if (folder / "onnx" / f"{name}.onnx").exists()]

    def compare(name: str, case: str, logits: tuple[Array, Array | None], onnx: Array) -> Check:
        rtol = RTOL_CUDA_FP16 if (name, precision) == ("decode_cuda", "fp16") else RTOL[precision]
        eager, rough = logits
        return _compare(name, case, eager, onnx, rtol, rough if name == "decode" else None)

    def draw(batch: int, length: int) -> Array:
        return random.integers(model.config.vocab_size, size=(batch, length))

    def graph(name: str) -> Graph:
        return Graph(folder, name, model.config, precision)

    shapes = [(1, length) for length in lengths(context)]
    shapes += [(batch, length) for batch in (2, 3) for length in (1, 2, 7, 33) if length <= context]
    for batch, length in shapes:
        ids = draw(batch, length)
        eager = both_heads(ids)
        yield compare("forward", "whole sequence", eager, graph("forward").run(input_ids=ids)[0])
        yield compare("model", "prefill", eager, graph("model").prefill(ids))
        for name in in_place:
            yield compare(name, "prefill", eager, graph(name).prefill(ids))
    for batch, length in ((2, min(24, context)), (1, context)):
        ids = draw(batch, length)
        eager = both_heads(ids)
        yield compare("model", "step by step", eager, _stepwise(graph("model"), ids))
        for name in in_place:
            yield compare(name, "step by step", eager, _stepwise(graph(name), ids))
    if context >= 3:
        ids = draw(3, min(21, context))
        sizes = [max(1, ids.shape[1] - 1 - row * ids.shape[1] // 3) for row in range(3)]
        rows = [both_heads(ids[[row], : size + 1], size - 1) for row, size in enumerate(sizes)]
        rough = [logits for _, logits in rows if logits is not None]
        eager = np.concatenate([logits for logits, _ in rows]), np.concatenate(rough) if rough else None
        yield compare("model", "left-padded batch", eager, _left_padded(graph("model"), ids, sizes))
        for name in in_place:
            yield compare(name, "ragged batch", eager, _ragged(graph(name), ids, sizes))
    if not is_classifier(model):
        yield from _greedy(model, folder, precision)


def _greedy(model: GPTModel, folder: Path, precision: str) -> Iterator[Check]:
    """Hold ``generate`` against the book's loop: ragged rows, an end that some row reaches, a text that outgrows."""
    context, random = model.config.context_length, np.random.default_rng(2)
    graph = Graph(folder, "generate", model.config, precision)
    hold = partial(judge, model, rtol=RTOL[precision])
    for case, sizes, steps in (("greedy", [7], 4), ("ragged", [1, 9, 4], 4), ("beyond the context", [context - 1], 3)):
        rows = [random.integers(model.config.vocab_size, size=max(1, min(size, context))) for size in sizes]
        output = generated(graph, rows, steps, -1)
        yield hold(case, rows, output, steps, -1)
        if len(rows) > 1:
            eos = int(output[0, -2])
            yield hold(f"{case}, early stop", rows, generated(graph, rows, steps, eos), steps, eos)


def generated(graph: Graph, rows: list[Array], max_new_tokens: int, eos_token_id: int) -> Array:
    """Ids (B, W): the rows, padded on the left, and what follows them."""
    width = max(len(row) for row in rows)
    return graph.run(
        input_ids=np.stack([np.pad(row, (width - len(row), 0)) for row in rows]),
        attention_mask=np.stack([np.pad(np.ones_like(row), (width - len(row), 0)) for row in rows]),
        max_new_tokens=np.array(max_new_tokens),
        eos_token_id=np.array(eos_token_id),
    )[0]


def judge(
    model: GPTModel,
    case: str,
    rows: list[Array],
    output: Array,
    max_new_tokens: int,
    eos: int,
    rtol: float = RTOL["fp32"],
) -> Check:
    """Ask the eager model for each new id after the ids before it.

    ``max_abs_diff`` is the least error of the logits that explains the choices: half the lead of the token that the
    eager model prefers. It is infinite where no error explains the output: a wrong length, ids behind a row's end.
    """
    width, context = max(len(row) for row in rows), model.config.context_length
    new = output[:, width:]
    ends = [int(np.argmax(row == eos)) + 1 if eos in row else max_new_tokens for row in new]
    leads, largest = [], 0.0
    for row, new_ids, end in zip(rows, new, ends, strict=True):
        ids = np.concatenate([row, new_ids[:end]])
        for place in range(len(row), len(ids)):
            logits = eager_logits(model, ids[None, max(0, place - context) : place])[0, -1]  # (V,)
            leads.append(float(logits.max() - logits[ids[place]]))
            largest = max(largest, float(np.abs(logits).max()))
    filled = all((new_ids[end:] == eos).all() for new_ids, end in zip(new, ends, strict=True))
    difference = max(leads) / 2 if filled and new.shape[1] == max(ends) else np.inf
    agreement = leads.count(0.0) / len(leads)
    return Check("generate", case, len(rows), output.shape[1], difference, max(ATOL, rtol * largest), agreement)


def _stepwise(graph: Graph, ids: Array) -> Array:
    """Prefill half, then one token at a time; a single row reads all but the last five of the rest in one step."""
    batch, length = ids.shape
    first_single = max(length - 5, 1) if batch == 1 else length // 2 + 1
    cuts = sorted({length // 2, *range(first_single, length + 1)} - {0})
    cache, parts, past = graph.cache(batch, length), [], 0
    for cut in cuts:
        logits, cache = graph.step(ids[:, past:cut], past, cache)
        parts.append(logits)
        past = cut
    return np.concatenate(parts, axis=1)


def _left_padded(graph: Graph, ids: Array, sizes: list[int]) -> Array:
    """Rows of different length in one batch, then one token more each: the last two logits of each row (B, 2, V)."""
    batch, full = len(sizes), max(sizes)
    padded, mask = np.zeros((batch, full), np.int64), np.zeros((batch, full + 1), np.int64)
    for row, size in enumerate(sizes):
        padded[row, full - size :], mask[row, full - size :] = ids[row, :size], 1
    following = ids[np.arange(batch), sizes][:, None]
    first, cache = graph.step(padded, 0, graph.cache(batch, 0), mask[:, :full])
    second, _ = graph.step(following, full, cache, mask)
    return np.concatenate([first[:, -1:], second], axis=1)


def _ragged(graph: Graph, ids: Array, sizes: list[int]) -> Array:
    """The same for ``decode``, padded on the right."""
    batch, full = len(sizes), max(sizes)
    padded = np.zeros((batch, full), np.int64)
    for row, size in enumerate(sizes):
        padded[row, :size] = ids[row, :size]
    following = ids[np.arange(batch), sizes][:, None]
    totals = np.array(sizes, np.int32)
    positions, buffers = np.tile(np.arange(full), (batch, 1)), graph.cache(batch, full + 1)
    first, cache = graph.decode(padded, positions, totals, totals[:, None] - 1, buffers)
    second, _ = graph.decode(following, totals[:, None], totals + 1, np.zeros((batch, 1)), cache)
    return np.concatenate([first, second], axis=1)


def eager_logits(model: GPTModel, ids: Array) -> Array:
    """Return the model's logits (B, T, V) of ids (B, T)."""
    with torch.no_grad():
        logits: Array = model(torch.from_numpy(ids)).numpy()
    return logits


class Eager:
    """What the model says, by its own head and by the rough one that ``decode`` looks at first, if there is one."""

    def __init__(self, model: GPTModel, rough_head: Blocks | None) -> None:
        self.model = model
        self._rough = None if rough_head is None else rough_head.dense()

    def __call__(self, ids: Array, first: int = 0) -> tuple[Array, Array | None]:
        """Both logits (B, T - first, V) of all but the ``first`` positions of ids (B, T)."""
        read: list[torch.Tensor] = []
        handle = self.model.out_head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]), prepend=True)
        logits = eager_logits(self.model, ids)[:, first:]
        handle.remove()
        if self._rough is None:
            return logits, None
        rough: Array = (round_activations(read[0][:, first:], ROUGH_BITS) @ self._rough.T).numpy()
        return logits, rough


def _refine(onnx: Array, eager: Array, rough: Array) -> None:
    """Of logits (B, T, V) that are nearer to the rough ones keep the distance, and measure it from the model's.

    The better half of those that are not rough stays: which ones are the last of them a last bit decides.
    """
    for place in np.ndindex(onnx.shape[:2]):
        is_rough = np.abs(rough[place] - onnx[place]) < np.abs(eager[place] - onnx[place])  # (V,)
        is_rough[np.argpartition(rough[place], -N_BEST // 2)[-N_BEST // 2 :]] = False
        onnx[place] += np.where(is_rough, eager[place] - rough[place], 0)


def _compare(graph: str, case: str, eager: Array, onnx: Array, rtol: float, rough: Array | None = None) -> Check:
    """Overwrites ``onnx``: at a large vocabulary another copy would be the peak of the export's memory."""
    batch, length, _ = eager.shape
    agreement = float((eager.argmax(-1) == onnx.argmax(-1)).mean())
    if rough is not None:
        _refine(onnx, eager, rough)
    np.abs(np.subtract(eager, onnx, out=onnx), out=onnx)
    largest = max(float(eager.max()), -float(eager.min()))
    return Check(graph, case, batch, length, float(onnx.max()), max(ATOL, rtol * largest), agreement)
