"""Whether a row's best logits have the same bits whatever is computed along with it, tried out on this machine.

Kernels may add in another order for one row than for many. Which did on the processors that were seen is told in
docs/batch.md, and what decides is what this one does. Other logits are not looked at: no greedy choice is
theirs, and a large head computes them roughly.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .limits import never, until

if TYPE_CHECKING:
    from .session import Session


_N_BEST = 8


def is_step_invariant(session: "Session", n_tokens: int) -> bool:
    """Read a text token by token and so many tokens at a time, and compare the best logits' bits.

    False also where the context is too short to tell.
    """
    should_stop = until(session.timeout_s, never)  # a bundle's time limit holds here, too
    prompt, rest = _text(session, n_tokens)
    if not prompt:
        return False
    cache = session.new_cache(1, len(prompt) + n_tokens)
    cache.prefill([prompt], should_stop)
    logits = []
    for token_id in rest:
        cache.decode([token_id], should_stop)
        logits.append(cache.logits.copy())
    cache.shorten(len(prompt))
    cache.decode(rest[:1], should_stop, rest[1:])
    for n_accepted, wanted in enumerate(logits, start=1):
        if not _equal(cache.logits, wanted):
            return False
        if n_accepted < n_tokens:
            cache.accept()
    return True


def is_batch_invariant(session: "Session", n_rows: int) -> bool:
    """Read prompts and a token alone and as so many rows, and compare the best logits' bits.

    False also where the context is too short to tell.
    """
    should_stop = until(session.timeout_s, never)
    prompt, rest = _text(session, 1)
    prompts = [prompt[:length] for length in range(1, 4)]
    if len(prompt) < len(prompts):
        return False
    batch = session.new_cache(n_rows, len(prompts) + 1)
    batch.prefill([prompts[b % len(prompts)] for b in range(n_rows)], should_stop)
    read = batch.logits.copy()
    batch.decode(rest * n_rows, should_stop)
    for first, row in enumerate(prompts):
        alone = session.new_cache(1, len(prompts) + 1)
        alone.prefill([row], should_stop)
        same = [_equal(logits, alone.logits[0]) for logits in read[first :: len(prompts)]]
        alone.decode(rest, should_stop)
        same += [_equal(logits, alone.logits[0]) for logits in batch.logits[first :: len(prompts)]]
        if not all(same):
            return False
    return True


def _equal(logits: NDArray[np.float32], others: NDArray[np.float32]) -> bool:
    """Whether the best of logits (..., V) are the same ones and have the same bits."""
    count = min(_N_BEST, logits.shape[-1])
    best, best_others = (np.sort(np.argpartition(x, -count)[..., -count:]) for x in (logits, others))
    values = np.take_along_axis(logits, best, -1), np.take_along_axis(others, best, -1)
    return np.array_equal(best, best_others) and np.array_equal(*values)


def _text(session: "Session", n_tokens: int) -> tuple[list[int], list[int]]:
    """Return a prompt, empty where the context has no room for one, and so many ids behind it."""
    n_prompt = max(0, min(9, session.model.context_length - n_tokens))
    ids: list[int] = np.random.default_rng(0).integers(session.model.vocab_size, size=n_prompt + n_tokens).tolist()
    return ids[:n_prompt], ids[n_prompt:]
