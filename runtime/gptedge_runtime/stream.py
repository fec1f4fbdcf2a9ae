"""New ids as pieces of text, up to the end-of-text token or a stop text."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from .tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Request:
    """A prompt and how far to continue it: ``n_steps`` is ``max_new_tokens``, or less where the context is full."""

    prompt_token_ids: list[int]
    n_steps: int
    max_new_tokens: int
    stop: str | None


class Continuation:
    """New ids and their text, up to the end-of-text token or a stop text; it is fed id by id.

    ``finish_reason`` tells why it ended: ``eos`` (the end-of-text token, in neither ids nor text), ``stop`` (the stop
    text, cut off), ``length`` (all the tokens asked for), ``context`` (the context is full) or ``cancelled``.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self._pieces: list[str] = []
        self._request = request
        self._eos_token_id = tokenizer.eos_token_id
        self._decoder, self._cutter = StreamDecoder(tokenizer), Cutter(request.stop)

    @property
    def text(self) -> str:
        """The new text so far."""
        return "".join(self._pieces)

    def push(self, token_id: int) -> str:
        """Take an id, and return the text that it completes."""
        if token_id == self._eos_token_id:
            self.finish_reason = "eos"
            return ""
        self.token_ids.append(token_id)
        return self._add(self._cutter.push(self._decoder.push(token_id)))

    def finish(self) -> str:
        """Return the text that still waited: no further id comes."""
        piece = self._add(self._cutter.push(self._decoder.flush()) + self._cutter.flush())
        if self.finish_reason is None:
            full = "length" if self._request.n_steps == self._request.max_new_tokens else "context"
            self.finish_reason = full if len(self.token_ids) == self._request.n_steps else "cancelled"
        return piece

    def _add(self, piece: str) -> str:
        self._pieces.append(piece)
        if self._cutter.found:
            self.finish_reason = "stop"
        return piece


class TextStream(Iterator[str]):
    """Pieces of the new text; joined they are the whole of it, and no piece splits a character.

    Once exhausted, ``finish_reason`` tells why it ended, as in :class:`Continuation`.
    """

    def __init__(self, steps: Iterator[dict[int, int]], request: Request, tokenizer: Tokenizer) -> None:
        self.prompt_token_ids = request.prompt_token_ids
        self.prefill_ms = 0.0
        self.decode_ms = 0.0
        self._steps: Iterator[dict[int, int]] | None = steps
        self._n_steps = 0
        self._continuation = Continuation(request, tokenizer)

    def __next__(self) -> str:
        while self._steps is not None:
            if piece := self._read_step(self._steps):
                return piece
        raise StopIteration

    @property
    def token_ids(self) -> list[int]:
        """The new ids so far."""
        return self._continuation.token_ids

    @property
    def finish_reason(self) -> str | None:
        """Why it ended; None before the end."""
        return self._continuation.finish_reason

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of the steps after the prompt was read; None before there are any."""
        return 1000 * (self._n_steps - 1) / self.decode_ms if self._n_steps > 1 else None

    def _read_step(self, steps: Iterator[dict[int, int]]) -> str:
        """Return the text that the next id completes; the time that the reader takes for itself does not count."""
        started = time.perf_counter()
        try:
            step = next(steps, None)
        except BaseException:
            self._steps = None  # nothing more comes, nor a reason
            raise
        elapsed_ms = 1000 * (time.perf_counter() - started)
        if step is None:
            return self._end()
        if self._n_steps == 0:
            self.prefill_ms = elapsed_ms
        else:
            self.decode_ms += elapsed_ms
        self._n_steps += 1
        piece = self._continuation.push(step[0])
        return piece + self._end() if self.finish_reason else piece

    def _end(self) -> str:
        self._steps = None  # which holds the cache
        return self._continuation.finish()


class Cutter:
    """Let text through up to a stop text; the end that could be its beginning waits."""

    def __init__(self, stop: str | None) -> None:
        self.found = False
        self._stop = stop
        self._held = ""

    def push(self, text: str) -> str:
        """Return the text that certainly stands before any stop text."""
        if self.found:
            return ""
        if self._stop is None:
            return text
        self._held += text
        before, stop, _ = self._held.partition(self._stop)
        if stop:
            self.found, self._held = True, ""
            return before
        longest = min(len(self._held), len(self._stop) - 1)
        waiting = next(n for n in range(longest, -1, -1) if self._held.endswith(self._stop[:n]))
        ready = len(self._held) - waiting
        text, self._held = self._held[:ready], self._held[ready:]
        return text

    def flush(self) -> str:
        """Return what still waited: no stop text came."""
        text, self._held = self._held, ""
        return text
