"""Known answers: what the eager model said at export, kept in the bundle for ``gptedge verify``."""

from typing import Any

import numpy as np
import torch
from gptedge_models import GPTModel

from .classifier import is_classifier
from .verify import ATOL, RTOL

SLACK = {"fp32": 4, "fp16": 4, "int8": 2, "int4": 2}
"""Other processors add in other orders: a bundle that travelled may differ by this many times the export's bound."""


def known_answers(model: GPTModel, precision: str) -> dict[str, Any]:
    """Prompts of three lengths with greedy ids and, for the prompt's last position, a sample of the logits."""
    context, vocab_size = model.config.context_length, model.config.vocab_size
    random = np.random.default_rng(1)
    sizes = sorted({1, min(8, context), min(32, context)})
    prompts = [_answer(model, precision, random.integers(vocab_size, size=size).tolist()) for size in sizes]
    largest = max(abs(logit) for prompt in prompts for logit in prompt["logits"])
    return {"atol": _slack(precision, largest), "prompts": prompts}


def _slack(precision: str, largest_logit: float) -> float:
    return SLACK[precision] * max(ATOL, RTOL[precision] * largest_logit)


@torch.no_grad()
def _answer(model: GPTModel, precision: str, prompt: list[int], max_new_tokens: int = 8) -> dict[str, Any]:
    """The book's loop, ended before the first choice that is too close to call on another machine.

    A classifier's choice is no token: its loop ends after the first.
    """
    ids, first = list(prompt), None
    for _ in range(max_new_tokens):
        logits = model(torch.tensor([ids[-model.config.context_length :]]))[0, -1]  # (V,)
        first = logits if first is None else first
        values, indices = torch.topk(logits, min(2, len(logits)))
        slack = _slack(precision, float(logits.abs().max()))
        if is_classifier(model) or (len(values) == 2 and float(values[0] - values[1]) <= 2 * slack):
            break
        ids.append(int(indices[0]))
    assert first is not None
    sample = [*np.unique(np.linspace(0, len(first) - 1, 16).astype(int)).tolist(), int(first.argmax())]
    return {
        "token_ids": prompt,
        "new_token_ids": ids[len(prompt) :],
        "logit_ids": sample,
        "logits": [float(first[i]) for i in sample],
    }
