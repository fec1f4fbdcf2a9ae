"""Prompt lookup decoding: where the text repeats itself, several tokens are read in one step, and none is another.

Drafts are the ids that followed the same n-gram before (Saxena, "Prompt lookup decoding", 2023). One step reads them
all, and those stay that greedy decoding chooses (Leviathan et al., arXiv 2211.17192).
"""

from collections.abc import Sequence

import numpy as np

from .limits import ShouldStop, Stopped
from .session import Cache, Logits, Session

NGRAM = 12  # shorter ones come again in text that goes on otherwise: wrong drafts then cost what right ones gain
LOOK_EVERY = 8  # steps: small models feel each look
SIZES = (8, 16)  # tokens of a step with drafts: the second after a step whose drafts all stayed
EARNED = 1 / 64  # of a step's time, which each plain step allows drafts to lose
MAX_CREDIT = 8.0


class Speculation:
    """Decodes one greedy row as ``Cache.decode`` does, with the same logits' choice and fewer steps.

    Drafts are made on credit, counted in plain steps: tokens gained add to it, the time of steps with drafts takes from
    it, so that text which does not repeat loses at most ``EARNED`` of its time and one step.
    """

    def __init__(self, session: Session, cache: Cache, row: list[int]) -> None:
        self._session = session
        self._cache = cache
        self._row = row  # the caller appends to it
        self._lookup = Lookup(row)
        self._drafts: list[int] = []
        self._size = SIZES[0]
        self._credit = 0.0
        self._look_at = len(row) + 2  # ids: the first step is a plain one, whose time is the measure
        self._n_exact: int | None = None  # ids that the cache holds exactly as plain steps would, unless it is all

    def decode(self, next_ids: Sequence[int], should_stop: ShouldStop) -> None:
        """Bring the cache's logits up to the row's last id, ``next_ids[0]``. Raises ``Stopped``."""
        if self._drafts and self._drafts.pop(0) == next_ids[0]:
            self._cache.accept()
            self._earn(1)
            if not self._drafts:
                self._size = SIZES[-1]
        elif len(self._row) < self._look_at:
            self._cache.decode(next_ids, should_stop)
        else:
            self._look(next_ids, should_stop)
        if self._n_exact is not None and is_close(self._cache.logits[0]):
            self._read_again(self._n_exact, should_stop)

    def _look(self, next_ids: Sequence[int], should_stop: ShouldStop) -> None:
        """Make a step with drafts, after which the next one looks again, or a plain one."""
        self._drafts = self._draft() if self._credit >= 0 else []
        self._size = SIZES[0]
        self._look_at = len(self._row) + (1 if self._drafts else LOOK_EVERY)
        self._cache.decode(next_ids, should_stop, self._drafts)
        if not self._drafts:
            self._earn(LOOK_EVERY * EARNED)
            return
        self._earn(1 - self._cache.cost(1 + len(self._drafts)))
        if self._session.rounds_finely and self._n_exact is None:
            self._n_exact = len(self._row) - 1

    def _draft(self) -> list[int]:
        """Return drafts that fit into the cache, or none."""
        room = self._cache.capacity - len(self._row) + 1
        size = self._size if self._size <= room else SIZES[0]
        drafts = self._lookup.draft(size - 1) if size <= room else []
        return drafts if drafts and (self._session.rounds_finely or self._session.is_batch_invariant) else []

    def _read_again(self, n_exact: int, should_stop: ShouldStop) -> None:
        """Read once more, by plain steps, all ids behind those that plain steps have read.

        A step of several tokens adds in another order: its logits, and all that come from its keys and values, differ
        in the last bits. These may decide between logits so close; then the bits of the plain loop have to.
        """
        self._drafts = []
        self._cache.shorten(n_exact)
        for token_id in self._row[n_exact:]:
            if should_stop():
                raise Stopped
            self._cache.decode([token_id], should_stop)
            self._earn(-1)
        self._n_exact = None

    def _earn(self, steps: float) -> None:
        self._credit = min(self._credit + steps, MAX_CREDIT)


class Lookup:
    """Finds what followed the last n-gram of a growing row where it stood before, at the same cost at any length."""

    def __init__(self, row: list[int]) -> None:
        self._row = row
        self._n_read = 0
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram -> place in the row behind its last occurrence

    def draft(self, count: int) -> list[int]:
        """Return ``count`` ids, or none where the row's last n-gram is new. Once for each length of the row."""
        row, followed = self._row, self._followed
        for end in range(self._n_read + 1, len(row)):
            followed[tuple(row[max(end - NGRAM, 0) : end])] = end
        ngram = tuple(row[-NGRAM:])
        place = followed.get(ngram)
        followed[ngram] = self._n_read = len(row)
        if place is None:
            return []
        draft = row[place : place + count]
        period = len(row) - place
        while len(draft) < count:
            draft.append(draft[-period])
        return draft


def is_close(logits: Logits) -> bool:
    """Whether two sound float32 programs, which add in different orders, may find another largest logit of (V,).

    Each differs by at most the bound of parity: ``max(1e-5, 2e-5 * max|logit|)``.
    """
    top, lowest = float(logits[logits.argmax()]), float(logits[logits.argmin()])  # max() and min() take thrice as long
    return int(np.count_nonzero(logits >= top - 2 * max(1e-5, 2e-5 * max(top, -lowest)))) > 1
