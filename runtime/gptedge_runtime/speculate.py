"""Prompt lookup decoding: where the text repeats itself, several tokens are read in one step, and none is another.

Drafts are the ids that followed the same n-gram before (Saxena, "Prompt lookup decoding", 2023). One step reads them
all, and those stay that greedy decoding chooses (Leviathan et al., arXiv 2211.17192).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .cache import Cache, Logits
from .invariance import parity_bound
from .limits import ShouldStop, Stopped
from .session import Session


class Kind(NamedTuple):
    """Drafts behind n-grams of one length."""

    ngram: int
    sizes: tuple[int, ...]  # tokens of a step with drafts: the next one after a step whose drafts all stayed
    look_every: int  # steps: small models feel each look


LONG = Kind(12, (4, 8, 16), 8)  # behind shorter ones text often goes on otherwise, which so many drafts do not bear
SHORT = Kind(3, (2,), 1)
SHORT_FROM_S = 0.001  # of a plain step: two tokens take the demo model 1.6 times as long, and it feels each look
SHORT_FROM_STEPS = 256  # of the session: trying out the bits takes as long as about eight, then at most 3 % of its time
EARNED = 1 / 128  # of a step's time, which each step allows drafts of a kind to lose
MAX_CREDIT = 8.0


class Speculation:
    """Decodes one greedy row as ``Cache.decode`` does, with the same logits' choice and fewer steps.

    Short drafts are for int8, which reads two tokens in little more time than one. int4 does not, and at float32 what
    they gain would go into reading again.
    """

    def __init__(self, session: Session, cache: Cache, row: list[int]) -> None:
        self._session = session
        self._cache = cache
        self._row = row  # the caller appends to it
        kinds = (LONG, SHORT) if session.precision == "int8" and not session.rounds_finely else (LONG,)
        self._drafters = [Drafter(row, kind) for kind in kinds]
        self._drafter = self._drafters[0]  # who made the drafts
        self._look_at = self._drafter.look_at
        self._drafts: list[int] = []
        self._n_exact: int | None = None  # ids that were read as plain steps would, unless it is all

    def decode(self, next_ids: Sequence[int], should_stop: ShouldStop) -> None:
        """Bring the cache's logits up to the row's last id, ``next_ids[0]``. Raises ``Stopped``."""
        if self._drafts and self._drafts.pop(0) == next_ids[0]:
            self._cache.accept()
            self._drafter.earn(1)
            if not self._drafts:
                self._drafter.grow()
        elif len(self._row) < self._look_at:
            self._step(next_ids, should_stop)
        else:
            self._look(next_ids, should_stop)
        if self._n_exact is not None and not self._session.rounds_finely:
            self._n_exact = len(self._row) - 1  # keys and values are exact, and of logits those of this step count
        if self._n_exact is not None and is_close(self._cache.logits[0], self._session.parity):
            self._read_again(self._n_exact, should_stop)

    def _look(self, next_ids: Sequence[int], should_stop: ShouldStop) -> None:
        """Make a step with drafts, or a plain one."""
        pays = self._cache.plain_step_s > SHORT_FROM_S and self._session.n_steps >= SHORT_FROM_STEPS
        drafters = self._drafters if pays else self._drafters[:1]
        self._drafts = self._draft(drafters)
        self._look_at = min(drafter.look_at for drafter in drafters)
        self._step(next_ids, should_stop, self._drafts)
        if self._drafts:
            self._drafter.earn(1 - self._cache.cost(1 + len(self._drafts)))

    def _step(self, next_ids: Sequence[int], should_stop: ShouldStop, drafts: Sequence[int] = ()) -> None:
        self._cache.decode(next_ids, should_stop, drafts)
        if not self._session.rounds_finely:
            self._n_exact = None
        if drafts and self._n_exact is None and self._session.step_difference(1 + len(drafts)):
            self._n_exact = len(self._row) - 1

    def _draft(self, drafters: list["Drafter"]) -> list[int]:
        """Return drafts that fit into the cache, or none."""
        room = self._cache.capacity - len(self._row) + 1
        for drafter in drafters:
            drafts = drafter.draft(room)
            if drafts and self._session.step_difference(1 + len(drafts)) is not None:
                self._drafter = drafter
                return drafts
        return []

    def _read_again(self, n_exact: int, should_stop: ShouldStop) -> None:
        """Read once more, by plain steps, all ids behind those that were read as plain steps would.

        A step of several tokens adds in another order: at float32 its logits, and all that come from its keys and
        values, differ in the last bits, at int4 the logits alone. These may decide between logits so close; then the
        bits of the plain loop have to.
        """
        self._drafts = []
        self._cache.shorten(n_exact)
        for token_id in self._row[n_exact:]:
            if should_stop():
                raise Stopped
            self._cache.decode([token_id], should_stop)
            self._drafter.earn(-1)
        self._n_exact = None


class Drafter:
    """Makes drafts of one kind on credit, counted in plain steps.

    Tokens gained add to it, the time of steps with drafts takes from it, so that text in which all are wrong loses at
    most ``EARNED`` of its time and one step with drafts.
    """

    def __init__(self, row: list[int], kind: Kind) -> None:
        self._row = row
        self._kind = kind
        self._lookup = Lookup(row, kind.ngram)
        self._level = self._next_level = 0  # in the kind's sizes
        self._credit = 0.0
        self.look_at = len(row) + 2  # ids: the first step is a plain one, whose time is the measure

    def draft(self, room: int) -> list[int]:
        """Return drafts of what follows the row, for a step of at most ``room`` tokens, or none."""
        if len(self._row) < self.look_at:
            return []
        sizes = self._kind.sizes
        level = self._level if sizes[self._level] <= room else 0
        drafts = self._lookup.draft(sizes[level] - 1) if self._credit >= 0 and sizes[level] <= room else []
        self._level, self._next_level = 0, min(level + 1, len(sizes) - 1)
        self.look_at = len(self._row) + (1 if drafts else self._kind.look_every)
        if not drafts:
            self.earn(EARNED * self._kind.look_every)
        return drafts

    def grow(self) -> None:
        """Take the next size next time: all drafts stayed."""
        self._level = self._next_level

    def earn(self, steps: float) -> None:
        """Add to the credit."""
        self._credit = min(self._credit + steps, MAX_CREDIT)


class Lookup:
    """Finds what followed the last n-gram of a growing row where it stood before, at the same cost at any length."""

    def __init__(self, row: list[int], ngram: int) -> None:
        self._row = row
        self._ngram = ngram
        self._n_read = 0
        self._followed: dict[tuple[int, ...], int] = {}  # n-gram -> place in the row behind its last occurrence

    def draft(self, count: int) -> list[int]:
        """Return ``count`` ids, or none where the row's last n-gram is new. Once for each length of the row."""
        row, followed, size = self._row, self._followed, self._ngram
        for end in range(self._n_read + 1, len(row)):
            followed[tuple(row[max(end - size, 0) : end])] = end
        ngram = tuple(row[-size:])
        place = followed.get(ngram)
        followed[ngram] = self._n_read = len(row)
        if place is None:
            return []
        draft = row[place : place + count]
        period = len(row) - place
        while len(draft) < count:
            draft.append(draft[-period])
        return draft


def is_close(logits: Logits, parity: float) -> bool:
    """Whether two sound float32 programs, which add in different orders, may find another largest logit of (V,).

    Each differs by at most this share of the bound of parity, ``max(1e-5, 2e-5 * max|logit|)``.
    """
    top = float(logits[logits.argmax()])  # max() takes thrice as long
    return int(np.count_nonzero(logits >= top - 2 * parity * parity_bound(logits, top))) > 1
