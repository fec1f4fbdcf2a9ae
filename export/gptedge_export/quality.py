"""What a precision costs: the graphs of a bundle beside the model in float32, on a text."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gptedge_models import GPTConfig, GPTModel, generate_text_simple
from gptedge_models.stories import stories

from .errors import ExportError, ParityError
from .graph_run import Array, Graph
from .verify import ACTIVATION_MAX, behind_prompt, eager_logits, generated
from .vocabulary import Vocabulary

N_TOKENS = 8192
"""To look at, and as many to measure on."""

CALIBRATION_SEED, HELD_OUT_SEED = 3, 2  # of stories; the demo model learnt from others
MIN_TOP1_AGREEMENT = {"fp16": 0.995, "bf16": 0.99, "int8": 0.99, "int4": 0.95}
SURE_PERPLEXITY = 2.0  # below it the model gives what comes next half of the probability or more
MAX_KL_NATS = {"fp16": 1e-3, "bf16": 1e-3, "int8": 0.01, "int4": 0.1}
"""Perplexity then rises by about as much: 0.1, 0.1, 1 and 10 %."""
GREEDY_TOKENS = 64
PROMPT_TOKENS = 8

Texts = Sequence[Sequence[int]]


@dataclass(frozen=True)
class Quality:
    """``top1_agreement`` is the share of ``tokens`` after which both prefer the same next one, ``kl_nats`` the mean
    divergence of the model's distribution from the bundle's, ``greedy_tokens`` how many ids both write alike after the
    beginning of each text. Both of the former are of ``forward``, and once more, where there is a graph ``prefill``, of
    ``decode`` over the second half of each text of four tokens or more, behind the first as ``prefill`` reads it on
    processors that take the fewest bits. ``judged`` names what had to keep its bound: both or one of the two that have
    one, or none.
    """

    text: str
    tokens: int
    max_abs_diff: float
    mean_abs_diff: float
    kl_nats: float
    max_kl_nats: float
    top1_agreement: float
    min_top1_agreement: float
    kl_nats_behind_prompts: float | None
    top1_agreement_behind_prompts: float | None
    judged: list[str]
    perplexity: float
    fp32_perplexity: float
    greedy_tokens: list[int]
    greedy_tokens_max: int


def sample_texts(vocabulary: Vocabulary, config: GPTConfig, calibration: str | None) -> tuple[Texts, Texts]:
    """Return texts as ids, at most a context long, to look at while rounding, and others to measure on.

    They are stories such as the demo model tells, or every other part of ``calibration``. Raises :class:`ExportError`
    where that is too short.
    """
    if calibration is None:
        end = [] if vocabulary.eos_token_id is None else [vocabulary.eos_token_id]
        told = [stories(seed, N_TOKENS) for seed in (CALIBRATION_SEED, HELD_OUT_SEED)]
        looked_at, held_out = (
            ((vocabulary.encode(story) + end)[: config.context_length] for story in each) for each in told
        )
        return _take(looked_at), _take(held_out)
    ids = vocabulary.encode(calibration)
    size = min(config.context_length, 256)
    parts = [ids[start : start + size] for start in range(0, len(ids) - 1, size)]
    if len(parts) < 8:
        raise ExportError(f"the calibration text has {len(ids):,} tokens: give at least {8 * size:,}")
    return _take(iter(parts[0::2])), _take(iter(parts[1::2]))


def _take(texts: Iterator[list[int]]) -> Texts:
    """As many texts as make up ``N_TOKENS``."""
    taken: list[list[int]] = []
    while sum(map(len, taken)) < N_TOKENS and (text := next(texts, None)) is not None:
        taken.append(text)
    return taken


def measure(model: GPTModel, folder: Path, precision: str, texts: Texts, name: str) -> Quality:
    """Compare the graphs in ``folder/onnx`` with ``model``, float32 as it came.

    Both are judged where the model knows the text: where it foretells it better than a blind guess by far. An untrained
    model has no preference worth keeping. The agreement is judged where the model is sure, too: a text that may go on
    in many ways leaves it choices between all but equals, which any rounding turns. Raises :class:`ParityError` beyond
    a bound.
    """
    graph = Graph(folder, "forward", model.config, precision)
    sums, largest, behind, tokens_behind = np.zeros(5), 0.0, np.zeros(5), 0
    has_prefill = (folder / "onnx" / "prefill.onnx").exists()
    cached = {name: Graph(folder, name, model.config, precision) for name in ("prefill", "decode") if has_prefill}
    for ids in texts:
        row, half = np.array([ids]), len(ids) // 2
        eager, onnx = eager_logits(model, row)[0], graph.run(input_ids=row)[0][0]  # (T, V)
        largest = max(largest, float(np.abs(eager - onnx).max()))
        sums += _compare(eager, onnx, row[0])
        if has_prefill and half > 1:
            onnx, _ = behind_prompt(**cached, ids=row, n_prompt=half, activation_max=min(ACTIVATION_MAX))
            behind += _compare(eager[half:], onnx[0], row[0, half:])
            tokens_behind += len(ids) - half
    tokens, predicted = sum(map(len, texts)), max(1, sum(len(ids) - 1 for ids in texts))
    perplexity, fp32_perplexity = np.exp(np.minimum(sums[3:] / predicted, 700))  # float64 ends at e^709
    known = max(map(len, texts)) > 1 and bool(fp32_perplexity < model.config.vocab_size / 2)
    sure = known and bool(fp32_perplexity < SURE_PERPLEXITY)
    quality = Quality(
        text=name,
        tokens=tokens,
        max_abs_diff=largest,
        mean_abs_diff=float(sums[0] / tokens),
        kl_nats=float(sums[1] / tokens),
        max_kl_nats=MAX_KL_NATS[precision],
        top1_agreement=float(sums[2] / tokens),
        min_top1_agreement=MIN_TOP1_AGREEMENT[precision],
        kl_nats_behind_prompts=float(behind[1] / tokens_behind) if tokens_behind else None,
        top1_agreement_behind_prompts=float(behind[2] / tokens_behind) if tokens_behind else None,
        judged=["top1_agreement"] * sure + ["kl_nats"] * known,
        perplexity=float(perplexity),
        fp32_perplexity=float(fp32_perplexity),
        greedy_tokens=_greedy(model, folder, precision, texts),
        greedy_tokens_max=_greedy_room(model),
    )
    figures = [(name, quality.top1_agreement, quality.kl_nats)]
    if quality.top1_agreement_behind_prompts is not None and quality.kl_nats_behind_prompts is not None:
        figures.append(
            (f"{name}, behind a prompt", quality.top1_agreement_behind_prompts, quality.kl_nats_behind_prompts)
        )
    remedy = "take a higher --precision; nothing was written"
    for where, top1_agreement, kl_nats in figures:
        if sure and top1_agreement < quality.min_top1_agreement:
            raise ParityError(
                f"{precision} keeps {top1_agreement:.2%} of the model's choices on {where}, the bound is "
                f"{quality.min_top1_agreement:.1%}: {remedy}"
            )
        if known and not kl_nats <= quality.max_kl_nats:
            raise ParityError(
                f"{precision} diverges from the model by {kl_nats:.2g} nats (KL) on {where}, the bound is "
                f"{quality.max_kl_nats:g}: {remedy}"
            )
    return quality


def _compare(eager: Array, onnx: Array, ids: Array) -> Array:
    """Over the positions of one text, logits (T, V): sums of mean |d|, of KL, of equal choices, of both losses."""
    p, q = (torch.log_softmax(torch.from_numpy(logits), dim=-1) for logits in (eager, onnx))
    following = torch.from_numpy(ids[1:, None])
    kl = (p.exp() * (p - q)).sum()
    losses = [-x[:-1].gather(1, following).sum() for x in (q, p)]
    same = (eager.argmax(-1) == onnx.argmax(-1)).sum()
    return np.array([np.abs(eager - onnx).mean(-1).sum(), kl, same, *losses])


def _greedy(model: GPTModel, folder: Path, precision: str, texts: Texts) -> list[int]:
    """How many ids ``generate`` and the book's loop write alike after the first ids of four texts."""
    n_tokens, context = _greedy_room(model), model.config.context_length
    rows = [np.array(ids[:PROMPT_TOKENS]) for ids in texts if len(ids) >= PROMPT_TOKENS][:4]
    if not rows or not n_tokens:
        return []
    prompts = np.stack(rows)
    wanted = generate_text_simple(model, torch.from_numpy(prompts), n_tokens, context).numpy()[:, PROMPT_TOKENS:]
    graph = Graph(folder, "generate", model.config, precision)
    same = generated(graph, rows, n_tokens, -1)[:, PROMPT_TOKENS:] == wanted
    return [int(row.argmin()) if not row.all() else n_tokens for row in same]


def _greedy_room(model: GPTModel) -> int:
    return max(0, min(GREEDY_TOKENS, model.config.context_length - PROMPT_TOKENS))
