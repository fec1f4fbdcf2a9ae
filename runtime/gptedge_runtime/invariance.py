"""Whether a row's logits have the same bits whatever is computed along with it, tried out on this machine."""

from typing import TYPE_CHECKING

import numpy as np

from .limits import never, until

if TYPE_CHECKING:
    from .session import Session

N_DECODED = 16
"""As many as the longest step with drafts reads."""


def is_batch_invariant(session: "Session") -> bool:
    """Read a text token by token, several tokens at a time and beside other rows, and compare the logits' bits.

    Kernels may add in another order for one row than for many. Those for int8 did not on the processors that were seen
    (docs/performance.md), and what decides is what this one does. False also where the context is too short to tell.
    """
    should_stop = until(session.timeout_s, never)  # a bundle's time limit holds here, too
    n_prompt = min(9, session.model.context_length - N_DECODED)
    if n_prompt < 1:
        return False
    ids: list[int] = np.random.default_rng(0).integers(session.model.vocab_size, size=n_prompt + N_DECODED).tolist()
    prompt, rest = ids[:n_prompt], ids[n_prompt:]

    alone = session.new_cache(1, len(ids))
    alone.prefill([prompt], should_stop)
    logits = [alone.logits.copy()]
    for token_id in rest:
        alone.decode([token_id], should_stop)
        logits.append(alone.logits.copy())

    together = session.new_cache(1, len(ids))
    together.prefill([prompt], should_stop)
    together.decode([rest[0]], should_stop, rest[1:])
    for wanted in logits[1:]:
        if not np.array_equal(together.logits, wanted):
            return False
        if wanted is not logits[-1]:
            together.accept()

    batch = session.new_cache(3, len(ids))
    batch.prefill([prompt[:1], prompt, ids[: n_prompt + 2]], should_stop)
    same = np.array_equal(batch.logits[1], logits[0][0])
    batch.decode([ids[1], rest[0], 0], should_stop)
    return same and np.array_equal(batch.logits[1], logits[1][0])
