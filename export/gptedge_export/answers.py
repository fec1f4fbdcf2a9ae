"""Known answers: what the eager model said at export, kept in the bundle for ``gptedge verify``."""

from typing import Any

import numpy as np
import torch
from gptedge_models import GPTModel
from torch import Tensor

from .classifier import is_classifier
from .precision import BITS, Prepared
from .verify import ATOL, RTOL

SLACK, ROUNDED_SLACK = 4, 2
"""Other processors add in other orders: a bundle that travelled may differ by this many times the export's bound."""

RTOL_CACHE = 2e-4
"""Where keys and values have 8 bits, a last bit now and then turns one of them by a step: 1.2e-4 of the largest logit
was seen."""


def known_answers(prepared: Prepared, precision: str) -> dict[str, Any]:
    """Prompts of three lengths with greedy ids and, for the prompt's last position, a sample of the logits.

    At each precision they are those of the stored weights in float32. Where kernels round their inputs to 8 bits, the
    logits that follow stand beside them, with a bound that such roundings need and that hides small changes.
    """
    model = prepared.model
    context, vocab_size = model.config.context_length, model.config.vocab_size
    random = np.random.default_rng(1)
    sizes = sorted({1, min(8, context), min(32, context)})
    prompts = [_answer(model, precision, random.integers(vocab_size, size=size).tolist()) for size in sizes]
    largest = max(abs(logit) for prompt in prompts for logit in prompt["logits"])
    document = {"atol": _slack(largest, precision), "prompts": prompts}
    if precision in BITS:
        with prepared.as_computed():
            for prompt in prompts:
                prompt["rounded_logits"] = _sample(_last(model, prompt["token_ids"]), prompt["logit_ids"])
        largest = max(abs(logit) for prompt in prompts for logit in prompt["rounded_logits"])
        document["rounded_atol"] = ROUNDED_SLACK * max(ATOL, RTOL[precision] * largest)
    return document


def _slack(largest_logit: float, precision: str) -> float:
    rtol = RTOL_CACHE if precision in BITS else RTOL[precision]
    return SLACK * max(ATOL, rtol * largest_logit)


@torch.no_grad()
def _last(model: GPTModel, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids[-model.config.context_length :]]))[0, -1]  # (V,)
    return logits


def _sample(logits: Tensor, ids: list[int]) -> list[float]:
    return [float(logits[i]) for i in ids]


def _answer(model: GPTModel, precision: str, prompt: list[int], max_new_tokens: int = 8) -> dict[str, Any]:
    """The book's loop, ended before the first choice that is too close to call on another machine.

    A classifier's choice is no token: its loop ends after the first.
    """
    ids, first = list(prompt), None
    for _ in range(max_new_tokens):
        logits = _last(model, ids)
        first = logits if first is None else first
        values, indices = torch.topk(logits, min(2, len(logits)))
        slack = _slack(float(logits.abs().max()), precision)
        if is_classifier(model) or (len(values) == 2 and float(values[0] - values[1]) <= 2 * slack):
            break
        ids.append(int(indices[0]))
    assert first is not None
    sample = [*np.unique(np.linspace(0, len(first) - 1, 16).astype(int)).tolist(), int(first.argmax())]
    return {
        "token_ids": prompt,
        "new_token_ids": ids[len(prompt) :],
        "logit_ids": sample,
        "logits": _sample(first, sample),
    }
