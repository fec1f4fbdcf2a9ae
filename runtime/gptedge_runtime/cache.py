"""Keys and values of rows, which stay in place, and the decode steps that read ids into them.

In the shapes below B is the batch and V the vocabulary size.
"""

import time
from collections.abc import Iterator, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import not_finite
from .limits import ShouldStop
from .mapped import let_go
from .ort import empty
from .workers import is_cut_off

if TYPE_CHECKING:
    from .session import Session

Ids = NDArray[np.int64]
Logits = NDArray[np.float32]

CHUNK_TOKENS = 64  # of a row that is read into a cache of 8 bits: longer ones cost its attention more
SHORT_STEP_S = 0.1  # in which no stop is heard: a worker hears it, and takes longer


class Cache:
    """Keys and values of B rows, kept in place."""

    def __init__(self, session: "Session", key_values: list[Any]) -> None:
        self._session = session
        self.key_values = key_values
        batch, _, self.capacity, _ = key_values[0].shape
        self._lengths = [0] * batch
        self._steps: dict[int, Step] = {}
        self._step = self._steps[1] = Step(session, self.key_values, 1)
        self._n_accepted = 0
        self._is_refilled = False
        self.is_finite = True

    @property
    def logits(self) -> Logits:
        """Of each row's last token, float32 (B, V); every call writes over them."""
        self._step.read_logits()
        return self._step.logits[:, self._n_accepted]

    def best_ids(self, rows: Sequence[int]) -> list[int]:
        """Return the most likely id for each of these rows. Raises :class:`BundleError` where logits are not finite."""
        best = None if self._is_refilled else self._step.read_best_ids()
        if best is None:
            self._step.read_logits()
            ids, is_finite = [], True
            for b in rows:
                logits = self._step.logits_of[b][self._n_accepted]
                ids.append(int(logits.argmax()))
                is_finite = is_finite and isfinite(logits.item(ids[-1]))  # argmax finds NaN and +inf
        else:
            ids = best[rows, self._n_accepted].tolist()
            is_finite = min(ids) >= 0
        if not is_finite:
            self.is_finite = False
            raise not_finite()
        return ids

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(self._lengths)

    def prefill(self, rows: Sequence[Sequence[int]], should_stop: ShouldStop) -> None:
        """Read one row of ids for each row of the cache. Raises ``Stopped``."""
        lengths = [len(row) for row in rows]
        alone = self._session.precision == "int4"  # whose kernels give a row of a prompt other bits in company
        alone = alone or self._session.prefill_of(max(lengths)) is not None
        for part in split_rows(lengths, 1 if alone else self._session.prefill_tokens):
            self.refill(part, rows[part], should_stop)

    def refill(self, part: slice, rows: Sequence[Sequence[int]], should_stop: ShouldStop) -> None:
        """Read ids in the place of what these rows of the cache held. Raises ``Stopped``."""
        self._step, self._n_accepted, self._is_refilled = self._steps[1], 0, True
        self._step.read_logits()  # those of the other rows stay
        key_values = [array[part] for array in self.key_values]
        longest, begin = max(len(row) for row in rows), 0
        if len(rows) == 1 and (prefill := self._session.prefill_of(longest)):
            begin = longest - 1
            let_go(self._session.weights)  # else memory holds what both graphs have read of the file
            prefill.read(rows[0][:begin], key_values, should_stop)
        size = CHUNK_TOKENS if len(rows) == 1 and self._session.cache_dtype == "int8" else longest
        # float32's attention rounds the last token otherwise where it is alone in a tile: padding is alone, instead
        padding = int(self._session.rounds_finely and longest < self.capacity)
        for start in range(begin, longest, size):
            chunk = [row[start : start + size] for row in rows]
            self._session.read(chunk, start, key_values, self._step.logits[part], should_stop, padding)
        self._lengths[part] = map(len, rows)

    def decode(self, next_ids: Sequence[int], should_stop: ShouldStop, drafts: Sequence[int] = ()) -> None:
        """Append one id to each row. A full row gets its last place written over, and logits that mean nothing.

        A single row may bring drafts of the ids behind: they are read in the same step, and none belongs to the row
        before it is accepted. Raises ``Stopped``, though not from steps too short to be worth the ear.
        """
        n_tokens = 1 + len(drafts)
        if n_tokens not in self._steps:
            step = self._steps[n_tokens] = Step(self._session, self.key_values, n_tokens)
            step.least_s = n_tokens * self._steps[1].least_s  # the first run of a size takes far longer than others
        self._step, self._n_accepted, self._is_refilled = self._steps[n_tokens], 0, False
        last = self.capacity - n_tokens
        places = [min(length, last) for length in self._lengths]
        self._step.run(next_ids, drafts, places, should_stop)
        self._lengths = [place + 1 for place in places]

    def close(self) -> None:
        """Give it back: it must not be used again, though that is not checked."""
        self._session.take_back(self)

    def accept(self) -> None:
        """Append the next draft of the last step; its logits are there already."""
        self._n_accepted += 1
        self._lengths[0] += 1

    def shorten(self, length: int) -> None:
        """Forget all but the first ids of each row."""
        self._lengths = [length] * len(self._lengths)

    @property
    def plain_step_s(self) -> float:
        """The least time that a step of one token took."""
        return self._steps[1].least_s

    def cost(self, n_tokens: int) -> float:
        """Return the time of a step of several tokens, as a multiple of a plain step's."""
        return self._steps[n_tokens].least_s / self.plain_step_s


class Step:
    """The buffers of a decode step of one or several tokens a row, bound once, and the least time that it took.

    Its numbers are written one by one: numpy's calls take longer, after a run most of all, which leaves nothing of them
    in the processor's cache.
    """

    def __init__(self, session: "Session", key_values: Sequence[NDArray[np.float32]], n_tokens: int) -> None:
        batch = len(key_values[0])
        self._session = session
        self._feeds: dict[str, NDArray[Any]] = {
            "input_ids": np.zeros((batch, n_tokens), np.int64),
            "position_ids": np.zeros((batch, n_tokens), np.int64),
            "seqlens_k": np.zeros(batch, np.int32),
            "total_sequence_length": np.zeros((), np.int32),
            "logit_positions": np.tile(np.arange(n_tokens), (batch, 1)),
        }
        flat = [array.reshape(-1).data for array in self._feeds.values()]
        self._ids, self._positions, self._last, self._total, _ = flat
        self.logits = empty(batch, n_tokens, session.model.n_outputs)
        self.logits_of = [list(logits) for logits in self.logits]  # of a row's token (V,), the same memory
        self.least_s = np.inf
        self._binding = session.bind(self._feeds, key_values, self.logits)

    def read_logits(self) -> None:
        """Bring the logits of the last run into ``logits``."""
        self._session.read_logits(self._binding)

    def read_best_ids(self) -> Ids | None:
        """Return the most likely ids (B, n_tokens) of the last run where the graph tells them."""
        return self._session.read_best_ids(self._binding)

    def run(
        self, next_ids: Sequence[int], drafts: Sequence[int], places: Sequence[int], should_stop: ShouldStop
    ) -> None:
        """Read one id for each row, and drafts behind it, at its place and those behind. Raises ``Stopped``."""
        at, n_drafts = 0, len(drafts)
        for row, (next_id, place) in enumerate(zip(next_ids, places, strict=True)):
            for position, token_id in enumerate((next_id, *drafts), start=place):
                self._ids[at], self._positions[at] = token_id, position
                at += 1
            self._last[row] = place + n_drafts
        self._total[0] = max(places) + 1 + n_drafts
        started = time.perf_counter()
        if self.least_s > SHORT_STEP_S or self._session.timeout_s is not None or is_cut_off():
            self._session.run_long(self._binding, should_stop)
        else:
            self._session.run(self._binding)
        self.least_s = min(self.least_s, time.perf_counter() - started)
        self._session.n_steps += 1


def split_rows(lengths: Sequence[int], n_tokens: int) -> Iterator[slice]:
    """Cut rows into consecutive parts whose padded size is within ``n_tokens``, or which are one row."""
    start = 0
    for stop in range(1, len(lengths) + 1):
        if stop == len(lengths) or (stop + 1 - start) * max(lengths[start : stop + 1]) > n_tokens:
            yield slice(start, stop)
            start = stop
