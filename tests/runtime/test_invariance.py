"""Whether a row's logits have the same bits alone and in company is tried out, and one bit decides."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptedge_runtime import GPT, load
from gptedge_runtime.cache import Cache, Step
from gptedge_runtime.invariance import step_difference
from gptedge_runtime.limits import never
from gptedge_runtime.session import Session


@pytest.fixture(params=["int8", "int4"])
def rounded(request: pytest.FixtureRequest, bundles: Path) -> Iterator[GPT]:
    with load(bundles / str(request.param)) as gpt:
        yield gpt


@pytest.fixture(params=["close", "int8", "int4"])
def gpt(request: pytest.FixtureRequest, bundles: Path) -> Iterator[GPT]:
    with load(bundles / str(request.param)) as gpt:
        yield gpt


def some_steps_by_one_bit(monkeypatch: pytest.MonkeyPatch, which: Callable[[Step], bool]) -> None:
    original = Step.run

    def run(step: Step, *arguments: Any) -> None:
        original(step, *arguments)
        if which(step):
            for place in {(len(step.logits) - 1, step.logits.shape[1] - 1), *((b, 0) for b in range(len(step.logits)))}:
                best = step.logits[place].argmax()
                step.logits[place][best] = np.nextafter(step.logits[place][best], np.float32(np.inf))

    monkeypatch.setattr(Step, "run", run)


@pytest.mark.parametrize("n_tokens", [2, 16])
def test_one_other_bit_of_a_longer_step_is_seen(rounded: GPT, n_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    some_steps_by_one_bit(monkeypatch, lambda step: step.logits.shape[1] > 1)
    assert step_difference(rounded._session, n_tokens)


def test_logits_that_are_not_near_are_other_ones(rounded: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Step.run

    def run(step: Step, *arguments: Any) -> None:
        original(step, *arguments)
        if step.logits.shape[1] > 1:
            step.logits[0, -1] *= np.float32(1 + 1e-5)

    monkeypatch.setattr(Step, "run", run)
    assert step_difference(rounded._session, 4) is None


def test_one_other_key_of_a_longer_step_is_seen(rounded: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Cache.decode

    def decode(cache: Cache, next_ids: Any, should_stop: Any, drafts: Any = ()) -> None:
        original(cache, next_ids, should_stop, drafts)
        if drafts:
            cache.key_values[0][0, 0, 10, 0] ^= 1

    monkeypatch.setattr(Cache, "decode", decode)
    assert step_difference(rounded._session, 4) is None


def test_one_other_bit_of_the_last_logits_alone_is_seen(rounded: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those whose layers were computed together and whose head was not."""
    original = Session.read

    def read(session: Session, rows: Any, past: int, key_values: Any, logits: Any, *arguments: Any) -> None:
        original(session, rows, past, key_values, logits, *arguments)
        if past:
            best = logits[0, 0].argmax()
            logits[0, 0, best] = np.nextafter(logits[0, 0, best], np.float32(np.inf))

    monkeypatch.setattr(Session, "read", read)
    assert step_difference(rounded._session, 4) is None


def test_one_other_bit_of_a_batch_is_seen(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    some_steps_by_one_bit(monkeypatch, lambda step: len(step.logits) > 1)
    assert not gpt._session.is_batch_invariant(never)


def test_rows_of_4_bits_have_the_same_bits_in_any_company(bundles: Path) -> None:
    """Whatever the processor's kernels do: the graph gives them one row at a time, but for the head of a long step."""
    with load(bundles / "int4") as gpt:
        assert None not in [step_difference(gpt._session, n_tokens) for n_tokens in range(2, 17)]
        assert gpt._session.is_batch_invariant(never)


def test_a_prompt_has_the_same_bits_alone_and_beside_a_longer_one(tiny: GPT) -> None:
    """Of 17 tokens, too: attention takes 16 at a time here, and rounds the 17th otherwise where it is the last."""
    if not tiny._session.is_batch_invariant(never):
        pytest.skip("the kernels of this machine add in another order in company")
    prompts = [[7 * place % 256 for place in range(length)] for length in range(1, 31)]
    for prompt in prompts:
        alone, batch = tiny._session.new_cache(1, 32), tiny._session.new_cache(2, 32)
        alone.prefill([prompt], lambda: False)
        batch.prefill([prompt, prompts[-1]], lambda: False)
        np.testing.assert_array_equal(batch.logits[0], alone.logits[0])


def test_a_batch_has_the_ids_of_single_rows(gpt: GPT) -> None:
    """By their bits where the kernels here give the same ones, else since each row is computed alone."""
    random = np.random.default_rng(7)
    rows = [random.integers(270, size=size).tolist() for size in (1, 30, 5, 17, 2, 40)]
    single = [gpt.generate_ids(row, max_new_tokens=20) for row in rows]
    assert gpt.generate_ids(rows, max_new_tokens=20) == single


def test_a_batch_of_an_invariant_session_runs_in_one(gpt: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = set()
    original = Step.run

    def spy(step: Step, *arguments: Any) -> None:
        widths.add(len(step.logits))
        original(step, *arguments)

    monkeypatch.setattr(Step, "run", spy)
    for invariant, wanted in ((True, {3}), (False, {1})):
        monkeypatch.setattr(Session, "is_batch_invariant", lambda *_, answer=invariant: answer)
        widths.clear()
        gpt.generate_ids([[1, 2], [3], [4, 5, 6]], max_new_tokens=4)
        assert widths == wanted


def test_a_context_too_short_to_tell_tells_nothing(bundles: Path) -> None:
    with load(bundles / "odd") as odd:
        assert step_difference(odd._session, odd.config.context_length) is None


def test_no_short_trial_tells_of_threads_without_heads(tiny: GPT, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention of float32 parts a long row among them, in other parts in a batch: seen with prompts of 300 tokens."""
    monkeypatch.setattr(tiny._session, "_threads", tiny.config.n_heads + 1)
    assert not tiny._session.is_batch_invariant(never)


def test_a_stop_is_heard_before_the_bits_of_a_batch_are_tried_out(bundles: Path) -> None:
    with load(bundles / "int4") as gpt:
        assert gpt.generate_ids([[1, 2], [3]], max_new_tokens=4, should_stop=lambda: True) == [[], []]
        assert gpt._session._is_batch_invariant is None
