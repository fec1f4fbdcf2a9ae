"""The loop: ids in, ids out. It knows no text."""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np

from .cache import Cache, Logits
from .errors import InputError, shown
from .limits import ShouldStop, Stopped, TimeLimit
from .session import Session
from .speculate import Speculation, is_close

MAX_TEMPERATURE = float(np.finfo(np.float64).max)
Decode = Callable[[Sequence[int], ShouldStop], None]


@dataclass(frozen=True)
class Sampling:
    """How to draw a token instead of taking the most likely one.

    ``temperature`` divides the logits (0 takes the most likely token), ``top_k`` keeps the k most likely tokens,
    ``top_p`` the fewest most likely ones that reach this probability together. One ``seed`` gives the same ids again,
    to the first row of a batch those of a prompt alone.
    Raises :class:`InputError` for a value out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if type(self.temperature) not in (int, float) or not 0 <= self.temperature <= MAX_TEMPERATURE:
            raise InputError(f"temperature is {shown(self.temperature)}: give a number of at least 0")
        if type(self.top_p) not in (int, float) or not 0 < self.top_p <= 1:
            raise InputError(f"top_p is {shown(self.top_p)}: give a number above 0 and at most 1")
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise InputError(f"top_k is {shown(self.top_k)}: give a whole number of at least 1")
        if self.seed is not None and (type(self.seed) is not int or self.seed < 0):
            raise InputError(f"seed is {shown(self.seed)}: give a whole number of at least 0")


def count_steps(lengths: Sequence[int], max_new_tokens: int, context_length: int, on_overflow: str) -> list[int]:
    """Return how many ids each prompt gets: ``slide`` all, ``stop`` those that fit the context, ``error`` all or none.

    Raises :class:`InputError` where ``stop`` or ``error`` refuses a prompt.
    """
    if on_overflow not in ("slide", "stop", "error"):
        raise InputError(f"on_overflow is {shown(on_overflow)}: choose slide, stop or error")
    if on_overflow == "slide":
        return [max_new_tokens] * len(lengths)
    longest = max(lengths)
    if longest > context_length:
        raise InputError(
            f"prompt has {longest:,} tokens; the model reads at most {context_length:,}: "
            "shorten it or set on_overflow to slide"
        )
    if on_overflow == "error" and longest + max_new_tokens > context_length:
        raise InputError(
            f"prompt of {longest:,} and {max_new_tokens:,} new tokens exceed the context of {context_length:,}: "
            "ask for fewer or set on_overflow to slide or stop"
        )
    return [min(max_new_tokens, context_length - length) for length in lengths]


def generate(
    session: Session,
    prompts: Sequence[Sequence[int]],
    n_steps: Sequence[int],
    *,
    sampling: Sampling | None,
    should_stop: ShouldStop,
    speculate: bool = True,
    given_up: Set[int] = frozenset(),
) -> Iterator[dict[int, int]]:
    """Yield new ids of some rows at a time, ``n_steps[b]`` for row b in all; greedy ids are those that it gets alone.

    Where a batch rounds otherwise than a row alone, a row in which that may turn a choice goes on alone, once the
    others are done; where activations are rounded to 8 bits no bound says when, and each row is computed alone. A
    single greedy row is continued with drafts where they turn no choice, unless ``speculate`` is false: the same ids
    from fewer runs. The caller may add rows to ``given_up``, which run no further. Ends early when ``should_stop``
    returns true. Raises :class:`BundleError` for logits that are not finite, and ``TimeLimitError`` when the session's
    time limit is over.
    """
    limit = TimeLimit(session.timeout_s, should_stop)
    is_greedy = sampling is None or sampling.temperature == 0
    run = partial(_run, session, sampling, limit, speculate)
    alone, n_new = set[int](), [0] * len(prompts)
    try:
        bits_count = len(prompts) > 1 and is_greedy and session.holds_batches
        if bits_count and not (session.rounds_finely or session.is_batch_invariant(limit)):
            alone.update(range(len(prompts)))
        else:
            for step in limit.pausing(run(prompts, n_steps, given_up, alone)):
                for b in step:
                    n_new[b] += 1
                yield step
        for b in sorted(alone):
            steps = limit.pausing(run([prompts[b]], [n_steps[b]], frozenset(), set()))
            for step in islice(steps, n_new[b], None):
                yield {b: step[0]}
                if b in given_up:
                    break
    except Stopped:
        return


def _run(
    session: Session,
    sampling: Sampling | None,
    should_stop: ShouldStop,
    speculate: bool,
    prompts: Sequence[Sequence[int]],
    n_steps: Sequence[int],
    given_up: Set[int],
    close: set[int],
) -> Iterator[dict[int, int]]:
    """Yield step by step an id for each row that still runs. Raises :class:`Stopped`.

    A greedy row of a batch ends before a choice between logits so close that its own bits may choose otherwise, unless
    it has its own bits in company, too: it is added to ``close``.
    """
    context_length = session.model.context_length
    rows = [list(prompt) for prompt in prompts]
    ends = [len(row) + steps for row, steps in zip(rows, n_steps, strict=True)]
    seeds = np.random.SeedSequence(sampling.seed if sampling else 0).spawn(len(rows))
    randoms = [np.random.default_rng(seed) for seed in seeds]
    with closing(session.new_cache(len(rows), min(context_length, max(ends)))) as cache:
        decode: Decode = cache.decode
        is_greedy = sampling is None or sampling.temperature == 0
        if speculate and is_greedy and len(rows) == 1 and session.holds_batches:
            decode = Speculation(session, cache, rows[0]).decode
        is_watched = is_greedy and len(rows) > 1 and session.holds_batches and session.rounds_finely
        running = [b for b, steps in enumerate(n_steps) if steps]
        while running:
            if should_stop():
                raise Stopped
            _read_on(cache, decode, rows, running, context_length, should_stop)
            if is_watched:
                doubtful = {b for b in running if is_close(cache.logits[b], session.parity)}
                if doubtful and session.is_batch_invariant(should_stop):
                    is_watched = False
                else:
                    close.update(doubtful)
                    running = [b for b in running if b not in close]
            step = choose(cache, running, sampling, randoms)
            for b, token_id in step.items():
                rows[b].append(token_id)
            yield step
            running = [b for b in running if len(rows[b]) < ends[b] and b not in given_up]


def _read_on(
    cache: Cache,
    decode: Decode,
    rows: list[list[int]],
    running: list[int],
    context_length: int,
    should_stop: ShouldStop,
) -> None:
    """Bring the cache's logits up to each running row's last id.

    A row longer than the context is read anew, its last ids with positions from 0, as the book does: learned absolute
    positions leave nothing of the cache to reuse.
    """
    if cache.length == 0:
        cache.prefill([row[-context_length:] for row in rows], should_stop)
        return
    slid = [b for b in running if len(rows[b]) > context_length]
    if len(slid) < len(running):
        decode([row[-1] for row in rows], should_stop)
    for b in slid:
        cache.refill(slice(b, b + 1), [rows[b][-context_length:]], should_stop)


def choose(
    cache: Cache, running: list[int], sampling: Sampling | None, randoms: Sequence[np.random.Generator]
) -> dict[int, int]:
    """Return an id for each running row: the most likely one, or a drawn one."""
    best = cache.best_ids(running)
    if sampling is None or sampling.temperature == 0:
        return dict(zip(running, best, strict=True))
    return {b: draw(cache.logits[b], sampling, randoms[b]) for b in running}


def draw(logits: Logits, sampling: Sampling, random: np.random.Generator) -> int:
    """Return an id drawn from logits float32 (V,)."""
    with np.errstate(all="ignore"):  # a tiny temperature sends all but the most likely to -inf and 0, as it should
        return _draw(logits, sampling, random)


def _draw(logits: Logits, sampling: Sampling, random: np.random.Generator) -> int:
    scaled = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < len(scaled):
        scaled[scaled < np.partition(scaled, -sampling.top_k)[-sampling.top_k]] = -np.inf
    probabilities = np.exp(scaled) / np.exp(scaled).sum()
    if sampling.top_p < 1:
        order = np.argsort(-probabilities, kind="stable")
        before = np.cumsum(probabilities[order]) - probabilities[order]
        probabilities[order[before >= sampling.top_p]] = 0
    return int(random.choice(len(probabilities), p=probabilities / probabilities.sum()))
