"""New ids as pieces of text, up to the end-of-text token or a stop text."""

import time
from collections.abc import Iterator

from .tokenizer import StreamDecoder, Tokenizer


class TextStream(Iterator[str]):
    """Pieces of the new text; joined they are the whole of it, and no piece splits a character.

    Once exhausted, ``finish_reason`` tells why: ``eos`` (the end-of-text token, in neither ids nor text), ``stop`` (the
    stop text, cut off), ``length`` (all the tokens asked for), ``context`` (the context is full) or ``cancelled``.
    """

    def __init__(
        self,
        steps: Iterator[dict[int, int]],
        tokenizer: Tokenizer,
        *,
        prompt_token_ids: list[int],
        n_steps: int,
        max_new_tokens: int,
        stop: str | None,
    ) -> None:
        self.prompt_token_ids = prompt_token_ids
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.prefill_ms = 0.0
        self.decode_ms = 0.0
        self._steps = steps
        self._n_decoded = 0
        self._tokenizer = tokenizer
        self._full = "length" if n_steps == max_new_tokens else "context"
        self._n_steps = n_steps
        self._pieces = self._read(stop)

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def tokens_per_s(self) -> float | None:
        """Speed of the steps after the prompt was read; None before there are any."""
        return 1000 * self._n_decoded / self.decode_ms if self._n_decoded else None

    def _read(self, stop: str | None) -> Iterator[str]:
        decoder, cutter = StreamDecoder(self._tokenizer), Cutter(stop)
        for token_id in self._timed_ids():
            if token_id == self._tokenizer.eos_token_id:
                self.finish_reason = "eos"
                break
            self.token_ids.append(token_id)
            if piece := cutter.push(decoder.push(token_id)):
                yield piece
            if cutter.found:
                break
        if piece := cutter.push(decoder.flush()) + cutter.flush():
            yield piece
        if cutter.found:
            self.finish_reason = "stop"
        elif self.finish_reason is None:
            self.finish_reason = self._full if len(self.token_ids) == self._n_steps else "cancelled"

    def _timed_ids(self) -> Iterator[int]:
        """The time that the reader of the stream takes for itself does not count."""
        started = time.perf_counter()
        for number, step in enumerate(self._steps):
            elapsed_ms = 1000 * (time.perf_counter() - started)
            if number == 0:
                self.prefill_ms = elapsed_ms
            else:
                self.decode_ms += elapsed_ms
            self._n_decoded = number
            yield step[0]
            started = time.perf_counter()


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
