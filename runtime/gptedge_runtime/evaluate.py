"""How well a model predicts a text: perplexity, with a window that slides over the text."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from .errors import InputError, not_finite
from .gpt import GPT
from .inputs import read_count
from .limits import TimeLimit

_ROWS = 64  # of logits at a time, in float64


@dataclass(frozen=True)
class Evaluation:
    """``perplexity`` is exp of ``nats_per_token``, the mean over ``tokens``: every token of the text but the first."""

    perplexity: float
    nats_per_token: float
    tokens: int
    window: int
    stride: int


def evaluate(gpt: GPT, text: str, *, stride: int | None = None, progress: bool = False) -> Evaluation:
    """Return the perplexity of ``text``.

    The window is the context length. It moves on by ``stride`` tokens, by default half of it, and each time the tokens
    are scored that no window before it scored: but for the beginning of the text, each sees at least
    ``window - stride`` tokens before it. Raises :class:`InputError`, and ``TimeLimitError`` where that limit is over.
    """
    ids = gpt.tokenizer.encode(text)
    window = gpt.config.context_length
    stride = read_count("stride", max(window // 2, 1) if stride is None else stride, low=1)
    if stride > window:
        raise InputError(f"stride is {stride:,}, the context only {window:,}: tokens between would not be scored")
    if len(ids) < 2:
        raise InputError(f"the text has {len(ids)} tokens: give at least 2, the first is only read")
    nats, scored, limit = 0.0, 0, TimeLimit(gpt.timeout_s)
    with tqdm(total=len(ids) - 1, desc="eval", unit=" tokens", disable=not progress, leave=False) as bar:
        for begin in range(0, len(ids) - 1, stride):
            limit()
            end = min(begin + window, len(ids) - 1)
            logits = gpt.logits(ids[begin:end])[0]  # (T, V); the logits of one token predict the next
            nats += _nats(logits[scored - begin :], np.array(ids[scored + 1 : end + 1]))
            bar.update(end - scored)
            scored = end
            if end == len(ids) - 1:
                break
    if not np.isfinite(nats):
        raise not_finite()
    return Evaluation(float(np.exp(nats / scored)), nats / scored, scored, window, stride)


def _nats(logits: NDArray[np.float32], targets: NDArray[np.int64]) -> float:
    """Return the summed cross-entropy of logits (T, V) and the ids (T,) that came."""
    nats = 0.0
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        rows -= rows.max(axis=1, keepdims=True)
        chosen = np.take_along_axis(rows, targets[start : start + _ROWS, None], axis=1)[:, 0]
        nats += float((np.log(np.exp(rows).sum(axis=1)) - chosen).sum())
    return nats
