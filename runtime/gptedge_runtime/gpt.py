"""A loaded bundle: text to text, ids to ids, ids to logits."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .bundle import TEMPLATE_PLACE, ModelConfig, open_bundle
from .errors import InputError, shown
from .generate import Sampling, count_steps, generate
from .inputs import TokenIds, read_count, read_rows
from .limits import check_timeout, count_threads, never
from .provider import choose_provider, open_session
from .session import Session
from .stream import Continuation, Request, TextStream
from .tokenizer import Tokenizer, load_tokenizer

DEFAULT_NEW_TOKENS = 128


def load(
    path: str | os.PathLike[str],
    *,
    provider: str = "auto",
    threads: int | None = None,
    timeout_s: float | None = None,
    progress: bool = False,
) -> "GPT":
    """Open a bundle after checking every file in it; one ``GPT`` serves many threads at once.

    ``provider`` is ``cpu``, ``cuda``, or ``auto``: ``cuda`` where that works, else ``cpu``. ``threads`` defaults to the
    CPUs this process may use, and is at most that. ``timeout_s``, for a bundle that you do not trust, ends each call
    that computes for longer, also where its graph never ends, with ``TimeLimitError``. ``progress`` shows a bar on
    stderr while a large bundle is checked. Close it before a fork, or spawn: onnxruntime's threads do not come
    along, and a process that inherits an open bundle may hang.
    Raises ``BundleNotFoundError``, ``BundleError``, ``ProviderError``, ``OutOfMemoryError`` or ``InputError``.
    """
    device, n_threads = choose_provider(provider), count_threads(threads)
    check_timeout(timeout_s)
    bundle = open_bundle(path, progress=progress)
    if bundle.classifier is not None:
        raise InputError(f"the bundle {bundle.folder} is a classifier: use load_classifier, or gptedge classify")
    session = open_session(bundle, provider=provider, device=device, threads=n_threads, timeout_s=timeout_s)
    return GPT(load_tokenizer(bundle), session, bundle.prompt_template)


class GPT:
    """Made by :func:`load`; close it, or use it in a ``with`` statement.

    ``config`` holds the sizes, ``provider`` the device in use, ``why_not_cuda`` why ``auto`` left a GPU aside,
    ``timeout_s`` the limit of each call, and ``tokenizer`` has ``encode`` and ``decode``.
    """

    def __init__(self, tokenizer: Tokenizer, session: Session, prompt_template: str | None = None) -> None:
        self.config: ModelConfig = session.model
        self.provider, self.why_not_cuda = session.provider, session.why_not_cuda
        self.timeout_s = session.timeout_s
        self.tokenizer = tokenizer
        self._prompt_template = prompt_template
        self._open_session: Session | None = session

    def apply_template(self, prompt: str) -> str:
        """Return ``prompt`` in the text around it that this instruction model was trained on.

        An input that goes with the instruction ends the prompt: ``instruction\\n\\n### Input:\\ninput``. Raises
        ``InputError`` for a bundle without a template.
        """
        if self._prompt_template is None:
            raise InputError(
                "the bundle has no prompt template: export it with --template alpaca, or leave it out here"
            )
        return self._prompt_template.replace(TEMPLATE_PLACE, prompt)

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: str | None = None,
        on_overflow: str = "slide",
        sampling: Sampling | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> str:
        """Return the text that continues ``prompt``, up to the end-of-text token or before the text ``stop``.

        Takes the most likely token at each step unless ``sampling`` is given. Past the context length ``on_overflow``
        decides: ``slide`` drops the oldest token and counts positions anew (the book's rule), ``stop`` ends there,
        ``error`` refuses before it starts. ``should_stop`` is asked all the time and ends it within 200 ms; what was
        made by then is returned. Raises ``InputError``.
        """
        return "".join(
            self.stream(
                prompt,
                max_new_tokens=max_new_tokens,
                stop=stop,
                on_overflow=on_overflow,
                sampling=sampling,
                should_stop=should_stop,
            )
        )

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        stop: str | None = None,
        on_overflow: str = "slide",
        sampling: Sampling | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> TextStream:
        """Yield the text of :meth:`generate` piece by piece, as it is made.

        Wrong arguments raise here, not at the first piece. Afterwards the stream tells ids, times and why it ended.
        """
        _check_types(sampling, should_stop)
        request = self.request(prompt, max_new_tokens=max_new_tokens, stop=stop, on_overflow=on_overflow)
        rows, n_steps = [request.prompt_token_ids], [request.n_steps]
        steps = generate(self._session, rows, n_steps, sampling=sampling, should_stop=should_stop)
        return TextStream(steps, request, self.tokenizer)

    def request(self, prompt: str, *, max_new_tokens: int, stop: str | None, on_overflow: str) -> Request:
        """Return what :meth:`generate` would do with these arguments. Raises ``InputError`` for wrong ones."""
        if stop is not None and (not isinstance(stop, str) or not stop):
            raise InputError(f"stop is {shown(stop)}: give a text of at least one character")
        (prompt_token_ids,), _ = read_rows(self.tokenizer.encode(prompt), self.config.vocab_size)
        max_new_tokens = read_count("max_new_tokens", max_new_tokens, low=0)
        (n_steps,) = count_steps([len(prompt_token_ids)], max_new_tokens, self.config.context_length, on_overflow)
        return Request(prompt_token_ids, n_steps, max_new_tokens, stop)

    def generate_batch(self, requests: Sequence[Request]) -> list[Continuation]:
        """Continue each request as :meth:`generate` does it alone, greedily and to the token, but all in one batch."""
        rows = [Continuation(request, self.tokenizer) for request in requests]
        ended = set[int]()
        prompts, n_steps = [r.prompt_token_ids for r in requests], [r.n_steps for r in requests]
        for step in generate(self._session, prompts, n_steps, sampling=None, should_stop=never, given_up=ended):
            for b, token_id in step.items():
                rows[b].push(token_id)
                if rows[b].finish_reason:
                    ended.add(b)
        for row in rows:
            row.finish()
        return rows

    def generate_ids(
        self,
        token_ids: TokenIds,
        *,
        max_new_tokens: int = DEFAULT_NEW_TOKENS,
        on_overflow: str = "slide",
        sampling: Sampling | None = None,
        should_stop: Callable[[], bool] = never,
    ) -> list[Any]:
        """Return the new ids of one prompt, list[int], or of each row of a batch, list[list[int]].

        A prompt is a list of ints or an array (T,); a batch is an array (B, T), or a list of prompts of any lengths.
        This is the book's loop: it does not end at the end-of-text token. The rest is as in :meth:`generate`.
        """
        _check_types(sampling, should_stop)
        rows, is_batch = read_rows(token_ids, self.config.vocab_size)
        max_new_tokens = read_count("max_new_tokens", max_new_tokens, low=0)
        n_steps = count_steps([len(row) for row in rows], max_new_tokens, self.config.context_length, on_overflow)
        new_ids: list[list[int]] = [[] for _ in rows]
        for step in generate(self._session, rows, n_steps, sampling=sampling, should_stop=should_stop):
            for row, token_id in step.items():
                new_ids[row].append(token_id)
        return new_ids if is_batch else new_ids[0]

    def logits(self, token_ids: TokenIds) -> NDArray[np.float32]:
        """Return logits float32 (B, T, V) of ids (B, T), or (1, T, V) of a single prompt.

        Raises ``InputError`` for rows of different lengths or longer than the context.
        """
        rows, _ = read_rows(token_ids, self.config.vocab_size)
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise InputError(f"rows have {lengths[0]:,} to {lengths[-1]:,} tokens: give rows of one length")
        if lengths[0] > self.config.context_length:
            raise InputError(
                f"prompt has {lengths[0]:,} tokens; the model reads at most {self.config.context_length:,}: shorten it"
            )
        return self._session.forward(np.array(rows, np.int64))

    def close(self) -> None:
        """Give the memory back once running calls have ended; later calls raise ``InputError``."""
        self._open_session = None

    def __enter__(self) -> "GPT":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def _session(self) -> Session:
        if self._open_session is None:
            raise InputError("this GPT is closed: load the bundle again")
        return self._open_session


def _check_types(sampling: object, should_stop: object) -> None:
    if not isinstance(sampling, Sampling | None):
        raise InputError(f"sampling is {type(sampling).__name__}: give a Sampling, or None for the most likely token")
    if not callable(should_stop):
        raise InputError(f"should_stop is {type(should_stop).__name__}: give a function without arguments")
