"""Known answers: what the eager model said at export, kept in the bundle for ``gptedge verify``."""

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from gptedge_models import GPTModel
from torch import Tensor

from .classifier import is_classifier
from .precision import BITS, Prepared
from .verify import ATOL, RTOL, Eager

MAX_NEW_TOKENS = 8
SLACK, ROUNDED_SLACK = 4, 2
"""Other processors add in other orders: a bundle that travelled may differ by this many times the export's bound."""

NUDGE = 2e-4
"""Of a step of the 8-bit cache: before it rounds keys and values, float32 was seen up to 1e-4 from float64."""


def known_answers(prepared: Prepared, precision: str) -> dict[str, Any]:
    """Prompts of three lengths with greedy ids and, for the prompt's last position, a sample of the logits.

    At each precision they are those of the stored weights in float32. Where keys and values have 8 bits, a last bit may
    turn one by a step: what that does to these logits is tried out, and widens their bound; the prompts are those, of
    some, where it does least. Where kernels round their inputs to 8 bits, the logits that follow stand beside them,
    with a bound that hides small changes.
    """
    model = prepared.model
    context, vocab_size = model.config.context_length, model.config.vocab_size
    random = np.random.default_rng(1)
    sizes = sorted({1, min(8, context), min(32, context)})
    n_draws = 16 if prepared.int8_cache else 1
    draws = [[random.integers(vocab_size, size=size).tolist() for _ in range(n_draws)] for size in sizes]
    answers = [_answer(prepared, min(some, key=partial(_turned, prepared))) for some in draws]
    prompts = [prompt for prompt, _ in answers]
    document: dict[str, Any] = {"atol": max(slack for _, slack in answers), "prompts": prompts}
    if precision in BITS:
        with prepared.as_computed():
            for prompt in prompts:
                prompt["rounded_logits"] = _sample(_last(model, prompt["token_ids"]), prompt["logit_ids"])
        largest = max(abs(logit) for prompt in prompts for logit in prompt["rounded_logits"])
        document["rounded_atol"] = ROUNDED_SLACK * max(ATOL, RTOL[precision] * largest)
    return document


def _slack(prepared: Prepared, ids: list[int], logits: Tensor) -> float:
    """How far the last logits (V,) of ids may lie from these on another processor."""
    return SLACK * max(ATOL, RTOL["fp32"] * float(logits.abs().max()), _turned(prepared, ids))


def _turned(prepared: Prepared, ids: list[int]) -> float:
    """How much the last logits of ids change where keys and values between two steps round to the other one."""
    if not prepared.int8_cache:
        return 0.0
    logits, changes = _last(prepared.model, ids), []
    for nudge in (NUDGE, -NUDGE):
        with _nudged(prepared.model, nudge):
            changes.append(float((_last(prepared.model, ids) - logits).abs().max()))
    return max(changes)


@contextlib.contextmanager
def _nudged(model: GPTModel, nudge: float) -> Iterator[None]:
    """Let the model add this to keys and values before it rounds them."""
    blocks: list[Any] = [*model.trf_blocks]
    handles = [
        layer.register_forward_hook(lambda _, __, output: output + nudge, prepend=True)  # before the hook that rounds
        for block in blocks
        for layer in (block.att.W_key, block.att.W_value)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _last(model: GPTModel, ids: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([ids[-model.config.context_length :]]))[0, -1]  # (V,)
    return logits


def _sample(logits: Tensor, ids: list[int]) -> list[float]:
    return [float(logits[i]) for i in ids]


def _answer(prepared: Prepared, prompt: list[int]) -> tuple[dict[str, Any], float]:
    """The book's loop, ended before the first choice that is too close to call on another machine, and the bound.

    A classifier's choice is no token: its loop ends after the first.
    """
    model, ids = prepared.model, list(prompt)
    first = logits = _last(model, ids)
    bound = slack = _slack(prepared, ids, logits)
    while len(ids) < len(prompt) + MAX_NEW_TOKENS:
        values, indices = torch.topk(logits, min(2, len(logits)))
        if is_classifier(model) or (len(values) == 2 and float(values[0] - values[1]) <= 2 * slack):
            break
        ids.append(int(indices[0]))
        logits = _last(model, ids)
        slack = _slack(prepared, ids, logits)
    _, rough = Eager(model, prepared.rough_head)(np.array([prompt]), len(prompt) - 1)
    some = np.linspace(0, len(first) - 1, 16).astype(int) if rough is None else rough[0, 0].argsort()[-16:]
    sample = [*np.unique(some).tolist(), int(first.argmax())]
    answer = {
        "token_ids": prompt,
        "new_token_ids": ids[len(prompt) :],
        "logit_ids": sample,
        "logits": _sample(first, sample),
    }
    return answer, bound
