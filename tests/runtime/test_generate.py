"""Token ids and logits against the eager model's (see tests/make_bundles.py)."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptedge_runtime import GPT, InputError, Sampling, load

CONTEXT = 32
PROMPTS = range(7)  # of 1, 2, 5, 17, 31, 32 and 40 tokens


@pytest.mark.parametrize("i", PROMPTS)
def test_greedy_ids_equal_the_books_loop_far_past_the_context(tiny: GPT, eager: Any, i: int) -> None:
    assert tiny.generate_ids(eager.prompts[i], max_new_tokens=72) == eager.new[i]


def test_rows_of_a_ragged_batch_equal_the_rows_alone_though_they_slide_at_other_steps(tiny: GPT, eager: Any) -> None:
    assert tiny.generate_ids(eager.prompts, max_new_tokens=72) == eager.new


@pytest.mark.parametrize("n_rows", [2, 7, 33])
def test_rows_of_a_ragged_batch_are_those_alone_also_where_the_last_bits_choose(bundles: Path, n_rows: int) -> None:
    prompts = [[7 * row % 256] * (1 + 5 * row % 40) for row in range(n_rows)]
    with load(bundles / "close") as gpt:
        alone = [gpt.generate_ids(prompt, max_new_tokens=40) for prompt in prompts]
        assert gpt.generate_ids(prompts, max_new_tokens=40) == alone


def test_a_stop_that_is_said_once_ends_all_rows_also_those_that_would_go_on_alone(bundles: Path) -> None:
    asked: list[bool] = []

    def should_stop() -> bool:
        asked.append(len(asked) == 2)
        return asked[-1]

    with load(bundles / "close") as gpt:
        assert all(len(ids) <= 2 for ids in gpt.generate_ids([[1], [2, 3]], max_new_tokens=40, should_stop=should_stop))
    assert asked == [False, False, True]


def test_a_batch_too_large_for_one_run_equals_its_rows(tiny: GPT, eager: Any) -> None:
    assert tiny.generate_ids(eager.prompts * 20, max_new_tokens=8) == [new[:8] for new in eager.new] * 20


@pytest.mark.parametrize("name", ["demo", "odd"])  # odd: heads of 5, which the cache fills up to 8
def test_other_models_equal_eager(bundles: Path, answers: Any, name: str) -> None:
    eager = answers(name)
    with load(bundles / name) as gpt:
        assert gpt.generate_ids(eager.prompts, max_new_tokens=24) == eager.new
        np.testing.assert_allclose(gpt.logits(eager.ids), eager.logits, rtol=0, atol=eager.atol)


@pytest.mark.parametrize("count", [0, 1, 2, 31])
def test_exactly_as_many_ids_as_asked(tiny: GPT, eager: Any, count: int) -> None:
    assert tiny.generate_ids(eager.prompts[2], max_new_tokens=count) == eager.new[2][:count]


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint16", ">i8", "<i4"])
def test_arrays_of_any_integer_type_are_prompts(tiny: GPT, eager: Any, dtype: str) -> None:
    prompt = np.array(eager.prompts[3]).astype(dtype)
    assert tiny.generate_ids(prompt, max_new_tokens=4) == eager.new[3][:4]
    assert tiny.generate_ids(prompt[None], max_new_tokens=4) == [eager.new[3][:4]]


@pytest.mark.parametrize("length", range(1, CONTEXT + 1))
def test_logits_match_eager(tiny: GPT, eager: Any, length: int) -> None:
    logits = tiny.logits(eager.ids[:, :length])
    assert logits.shape == (2, length, tiny.config.vocab_size)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, eager.logits[:, :length], rtol=0, atol=eager.atol)
    np.testing.assert_allclose(logits[:, -1], eager.last_logits[length - 1], rtol=0, atol=eager.atol)


def test_logits_of_a_large_batch_equal_those_of_its_rows(tiny: GPT, eager: Any) -> None:
    rows = np.repeat(eager.ids, 50, axis=0)
    np.testing.assert_allclose(tiny.logits(rows), np.repeat(eager.logits, 50, axis=0), rtol=0, atol=eager.atol)


def test_logits_of_one_prompt_are_a_batch_of_one(tiny: GPT, eager: Any) -> None:
    assert tiny.logits(eager.ids[0].tolist()).shape == (1, CONTEXT, tiny.config.vocab_size)


@pytest.mark.parametrize(("i", "fitting"), [(0, 31), (2, 27), (4, 1), (5, 0)])
def test_overflow_stop_ends_where_the_context_is_full(tiny: GPT, eager: Any, i: int, fitting: int) -> None:
    assert tiny.generate_ids(eager.prompts[i], max_new_tokens=72, on_overflow="stop") == eager.new[i][:fitting]


def test_overflow_stop_ends_each_row_of_a_batch_by_itself(tiny: GPT, eager: Any) -> None:
    rows = tiny.generate_ids(eager.prompts[:6], max_new_tokens=20, on_overflow="stop")
    assert rows == [new[:count] for new, count in zip(eager.new, [20, 20, 20, 15, 1, 0], strict=False)]


def test_overflow_error_allows_what_fits_exactly(tiny: GPT, eager: Any) -> None:
    assert tiny.generate_ids(eager.prompts[2], max_new_tokens=27, on_overflow="error") == eager.new[2][:27]


@pytest.mark.parametrize(
    ("i", "count", "on_overflow", "said"),
    [
        (2, 28, "error", "5 and 28 new tokens exceed the context of 32"),
        (6, 1, "error", "40 tokens; the model reads at most 32"),
        (6, 1, "stop", "40 tokens; the model reads at most 32"),
        (0, 1, "wrap", "'wrap': choose slide, stop or error"),
        (0, -1, "slide", "max_new_tokens is -1"),
        (0, 2.0, "slide", "max_new_tokens is 2.0"),
        (0, True, "slide", "max_new_tokens is True"),
    ],
)
def test_limits_are_refused_before_generation(
    tiny: GPT, eager: Any, i: int, count: Any, on_overflow: str, said: str
) -> None:
    with pytest.raises(InputError, match=said):
        tiny.generate_ids(eager.prompts[i], max_new_tokens=count, on_overflow=on_overflow)


@pytest.mark.parametrize(
    ("token_ids", "said"),
    [
        ([], "no tokens"),
        ([[]], "no tokens"),
        ([[1], []], "no tokens"),
        ([-1], "-1 is outside the vocabulary 0..269"),
        ([[1], [270]], "270 is outside the vocabulary 0..269"),
        ([2**70], "outside the vocabulary"),
        ([1.0], "1.0 is float"),
        ([True], "True is bool"),
        ([None], "None is NoneType"),
        ([1, [2]], "is list"),
        ([[1], 2], "token ids are int"),
        ([[[1]]], "is list"),
        ("hello", "token ids are str"),
        (7, "token ids are int"),
        (None, "token ids are NoneType"),
        (np.zeros(3), "token ids are ndarray"),
        (np.ones(3, bool), "token ids are ndarray"),
        (np.zeros((1, 1, 1), np.int64), "token ids are ndarray"),
        (np.zeros((2, 0), np.int64), "no tokens"),
        (np.array([2**63], np.uint64), "outside the vocabulary"),
    ],
)
def test_ids_that_the_model_cannot_read_are_refused(tiny: GPT, token_ids: Any, said: str) -> None:
    with pytest.raises(InputError, match=said):
        tiny.generate_ids(token_ids, max_new_tokens=1)
    with pytest.raises(InputError, match=said):
        tiny.logits(token_ids)


def test_logits_refuse_ragged_rows_and_too_long_ones(tiny: GPT) -> None:
    with pytest.raises(InputError, match="rows have 1 to 2 tokens"):
        tiny.logits([[1], [1, 2]])
    with pytest.raises(InputError, match="33 tokens; the model reads at most 32"):
        tiny.logits([1] * 33)


def test_sixteen_threads_on_one_gpt_give_the_same_bits_as_one(tiny: GPT, eager: Any) -> None:
    jobs = [(eager.prompts[k % 7], eager.ids[:, : 1 + k % CONTEXT]) for k in range(64)]
    barrier = threading.Barrier(16)

    def work(worker: int) -> list[Any]:
        barrier.wait()
        return [(tiny.generate_ids(ids, max_new_tokens=40), tiny.logits(rows)) for ids, rows in jobs[worker::16]]

    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(work, range(16)))
    for worker, results in enumerate(together):
        for (ids, rows), (new, logits) in zip(jobs[worker::16], results, strict=True):
            assert new == tiny.generate_ids(ids, max_new_tokens=40)
            np.testing.assert_array_equal(logits, tiny.logits(rows))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_process_reads_on_though_threads_stay_behind(bundles: Path) -> None:
    code = (
        "import os, sys, gptedge_runtime as runtime\n"
        "def ids(): return runtime.load(sys.argv[1]).generate_ids([1, 2, 3], max_new_tokens=4)\n"
        "before, child = ids(), os.fork()\n"
        "code = ids() != before if child == 0 else os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])\n"
        "sys.exit(int(code))"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(bundles / "tiny")]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0


def test_should_stop_ends_the_loop_and_leaves_what_was_made(tiny: GPT, eager: Any) -> None:
    asked = iter([False] * 12 + [True] * 100)
    new = tiny.generate_ids(eager.prompts[0], max_new_tokens=72, should_stop=lambda: next(asked))
    assert 0 < len(new) < 72
    assert new == eager.new[0][: len(new)]
    assert tiny.generate_ids(eager.prompts[0], max_new_tokens=72) == eager.new[0]


def test_should_stop_from_the_start_makes_nothing(tiny: GPT, eager: Any) -> None:
    assert tiny.generate_ids(eager.prompts[:2], max_new_tokens=5, should_stop=lambda: True) == [[], []]


def test_an_exception_in_should_stop_reaches_the_caller(tiny: GPT, eager: Any) -> None:
    def broken() -> bool:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tiny.generate_ids(eager.prompts[0], max_new_tokens=5, should_stop=broken)


def test_a_closed_gpt_says_so(bundles: Path) -> None:
    with load(bundles / "tiny") as gpt:
        pass
    for call in (lambda: gpt.generate_ids([1]), lambda: gpt.logits([1]), lambda: gpt.stream("a")):
        with pytest.raises(InputError, match="closed"):
            call()


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-9)])
def test_sampling_that_leaves_one_token_is_greedy(tiny: GPT, eager: Any, sampling: Sampling) -> None:
    assert tiny.generate_ids(eager.prompts[2], max_new_tokens=40, sampling=sampling) == eager.new[2][:40]


def test_a_seed_repeats_the_ids_and_a_row_does_not_depend_on_its_batch(tiny: GPT, eager: Any) -> None:
    sampling = Sampling(temperature=1.5, top_k=50, top_p=0.95, seed=3)
    alone = tiny.generate_ids(eager.prompts[0], max_new_tokens=40, sampling=sampling)
    batch = tiny.generate_ids(eager.prompts[:3], max_new_tokens=40, sampling=sampling)
    assert alone == batch[0]
    assert alone != eager.new[0][:40]
    assert alone != tiny.generate_ids(eager.prompts[0], max_new_tokens=40, sampling=Sampling(temperature=1.5, seed=4))


@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=2.0), Sampling(temperature=4.0, top_k=5), Sampling(top_p=0.9)]
)
def test_drawn_tokens_come_as_often_as_their_probability_says(tiny: GPT, eager: Any, sampling: Sampling) -> None:
    """Chi-square over 4,000 draws against the formula; its bound has a chance of about 1e-6 to fail a right program."""
    logits = tiny.logits(eager.prompts[3])[0, -1].astype(np.float64) / sampling.temperature
    order = np.argsort(-logits)
    p = np.exp(logits[order] - logits.max())
    p[sampling.top_k or len(p) :] = 0
    p /= p.sum()
    p[1:][np.cumsum(p)[:-1] >= sampling.top_p] = 0
    p /= p.sum()
    drawn = np.zeros(len(p))
    for seed in range(8):
        seeded = Sampling(sampling.temperature, sampling.top_k, sampling.top_p, seed)
        rows = tiny.generate_ids([eager.prompts[3]] * 500, max_new_tokens=1, sampling=seeded)
        np.add.at(drawn, [row[0] for row in rows], 1)
    observed, expected = drawn[order], 4000 * p
    assert expected.sum() == pytest.approx(observed.sum())
    assert observed[expected == 0].sum() == 0
    often = expected >= 5
    chi = float(((observed[often] - expected[often]) ** 2 / expected[often]).sum())
    degrees = max(int(often.sum()) - 1, 1)
    assert chi < degrees + 5 * np.sqrt(2 * degrees) + 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": 1.5}, "top_k is 1.5"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_sampling_out_of_range_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Sampling(**options)
