"""Whether a row's best logits have the same bits whatever is computed along with it, tried out on this machine.

Kernels may add in another order for one row than for many. Those for int8 did not on the processors that were seen
(docs/performance.md), and what decides is what this one does. Other logits are not looked at: no greedy choice is
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


def is_batch_invariant(session: "Session") -> bool:
    """Read a prompt and a token alone and beside other rows, and compare the best logits' bits.

    False also where the context is too short to tell.
    """
    should_stop = until(session.timeout_s, never)
    prompt, rest = _text(session, 2)
    if not prompt:
        return False
    alone, batch = session.new_cache(1, len(prompt) + 1), session.new_cache(3, len(prompt) + 2)
    alone.prefill([prompt], should_stop)
    batch.prefill([prompt[:1], prompt, prompt + rest], should_stop)
    same = _equal(batch.logits[1], alone.logits[0])
    alone.decode(rest[:1], should_stop)
    batch.decode([prompt[0], rest[0], 0], should_stop)
    return same and _equal(batch.logits[1], alone.logits[0])


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
