"""How far a row's best logits depend on what is computed along with it, tried out on this machine.

Kernels may add in another order for one row than for many. Which did on the processors that were seen is told in
docs/batch.md, and what decides is what this one does. Other logits are not looked at: no greedy choice is
theirs, and a large head computes them roughly.
"""

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .limits import ShouldStop, TimeLimit

if TYPE_CHECKING:
    from .session import Session


_N_BEST = 8
_MAX_DIFFERENCE = 0.25  # of the bound of parity, within which choices are read again: longer texts have larger ones


def step_difference(session: "Session", n_tokens: int) -> float | None:
    """Read a text token by token and so many tokens at a time, and return how far the best logits differ at most.

    It is told as a share of the bound of parity, 0 where the bits are the same. None where it is more than a quarter,
    where keys, values or the last logits, if they alone are asked for, have other bits, and where the context is too
    short to tell.
    """
    should_stop = TimeLimit(session.timeout_s)  # a bundle's time limit holds here, too
    prompt, rest = _text(session, n_tokens)
    if not prompt:
        return None
    cache = session.new_cache(1, len(prompt) + n_tokens)
    cache.prefill([prompt], should_stop)
    plain = []
    for token_id in rest:
        cache.decode([token_id], should_stop)
        plain.append(cache.logits[0].copy())
    key_values = [array.copy() for array in cache.key_values]
    cache.shorten(len(prompt))
    cache.decode(rest[:1], should_stop, rest[1:])
    differences = [_difference(cache.logits[0], plain[0])]
    for logits in plain[1:]:
        cache.accept()
        differences.append(_difference(cache.logits[0], logits))
    most = float(np.max(differences))
    is_exact = all(map(np.array_equal, cache.key_values, key_values))
    last = np.empty((1, 1, session.model.n_outputs), np.float32)
    session.read([rest], len(prompt), cache.key_values, last, should_stop)
    is_exact = is_exact and _difference(last[0, 0], plain[-1]) == 0
    return most if is_exact and most <= _MAX_DIFFERENCE else None


def is_batch_invariant(session: "Session", n_rows: int, should_stop: ShouldStop) -> bool:
    """Read prompts and a token alone and as so many rows, and compare the best logits' bits.

    False also where the context is too short to tell. Raises ``Stopped``.
    """
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
        differences = [_difference(logits, alone.logits[0]) for logits in read[first :: len(prompts)]]
        alone.decode(rest, should_stop)
        differences += [_difference(logits, alone.logits[0]) for logits in batch.logits[first :: len(prompts)]]
        if any(differences):
            return False
    return True


def parity_bound(logits: NDArray[np.float32], top: float) -> float:
    """How far apart two sound float32 programs may be at logits (V,) up to ``top``, which add in different orders."""
    return max(1e-5, 2e-5 * max(top, -float(logits[logits.argmin()])))


def _difference(logits: NDArray[np.float32], others: NDArray[np.float32]) -> float:
    """How far the best of logits (V,) are from these others at most, and theirs, as a share of the bound of parity."""
    count = min(_N_BEST, len(logits))
    best = np.concatenate([np.argpartition(x, -count)[-count:] for x in (logits, others)])
    return float(np.abs(logits[best] - others[best]).max()) / parity_bound(others, float(others.max()))


def _text(session: "Session", n_tokens: int) -> tuple[list[int], list[int]]:
    """Return a prompt, empty where the context has no room for one, and so many ids behind it."""
    n_prompt = max(0, min(9, session.model.context_length - n_tokens))
    ids: list[int] = np.random.default_rng(0).integers(session.model.vocab_size, size=n_prompt + n_tokens).tolist()
    return ids[:n_prompt], ids[n_prompt:]
