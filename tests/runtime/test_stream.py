"""Streamed text: the same as all at once, whole characters only, cut before a stop text."""

import gc
import weakref
from typing import Any

import pytest
from gptedge_runtime import GPT, InputError, Sampling
from gptedge_runtime.stream import Cutter, Request, TextStream
from gptedge_runtime.tokenizer import StreamDecoder
from hypothesis import given
from hypothesis import strategies as st

EOS = 261


def stream_ids(gpt: GPT, ids: list[int], *, n_steps: int | None = None, stop: str | None = None) -> TextStream:
    """A stream over ids that are given instead of generated."""
    steps = iter([{0: token_id} for token_id in ids])
    count = len(ids) if n_steps is None else n_steps
    return TextStream(steps, Request([1], n_steps=count, max_new_tokens=count, stop=stop), gpt.tokenizer)


@given(ids=st.lists(st.integers(0, 269)))
def test_pieces_joined_are_the_text_of_all_ids(tiny: GPT, ids: list[int]) -> None:
    decoder = StreamDecoder(tiny.tokenizer)
    pieces = [decoder.push(token_id) for token_id in ids]
    assert "".join([*pieces, decoder.flush()]) == tiny.tokenizer.decode(ids)


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_no_piece_splits_a_character(tiny: GPT, text: str) -> None:
    decoder = StreamDecoder(tiny.tokenizer)
    pieces = [decoder.push(token_id) for token_id in tiny.tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert decoder.flush() == ""


@given(ids=st.lists(st.integers(0, 269)))
def test_the_end_of_text_token_ends_the_text_and_is_not_part_of_it(tiny: GPT, ids: list[int]) -> None:
    stream = stream_ids(tiny, ids)
    text = "".join(stream)
    before = ids[: ids.index(EOS)] if EOS in ids else ids
    assert stream.token_ids == before
    assert text == tiny.tokenizer.decode(before)
    assert stream.finish_reason == ("eos" if EOS in ids else "length")


@given(chunks=st.lists(st.text("ab", max_size=4)), stop=st.text("ab", min_size=1, max_size=5))
def test_a_stop_text_cuts_wherever_the_pieces_break(chunks: list[str], stop: str) -> None:
    cutter = Cutter(stop)
    pieces = [cutter.push(chunk) for chunk in chunks] + [cutter.flush()]
    whole = "".join(chunks)
    assert "".join(pieces) == whole.partition(stop)[0]
    assert cutter.found == (stop in whole)


@given(chunks=st.lists(st.text("ab", max_size=4)), stop=st.text("ab", min_size=1, max_size=5))
def test_only_a_possible_beginning_of_the_stop_text_waits(chunks: list[str], stop: str) -> None:
    cutter, seen, shown = Cutter(stop), "", ""
    for chunk in chunks:
        seen, shown = seen + chunk, shown + cutter.push(chunk)
        if not cutter.found:
            waiting = seen.removeprefix(shown)
            assert stop.startswith(waiting)
            assert waiting != stop


def test_a_stop_text_ends_generation_at_the_token_that_completes_it(tiny: GPT) -> None:
    ids = tiny.tokenizer.encode("one two three")
    stream = stream_ids(tiny, ids, stop="tw")
    assert "".join(stream) == "one "
    assert stream.finish_reason == "stop"
    assert tiny.tokenizer.decode(stream.token_ids) == "one tw"


def test_a_stop_text_that_never_completes_is_not_lost(tiny: GPT) -> None:
    stream = stream_ids(tiny, tiny.tokenizer.encode("one tw"), stop="two")
    assert "".join(stream) == "one tw"
    assert stream.finish_reason == "length"


def test_an_unfinished_character_at_the_end_is_shown_as_a_replacement(tiny: GPT) -> None:
    assert "".join(stream_ids(tiny, [0xE2, 0x82])) == "\ufffd"


def test_fewer_steps_than_planned_mean_cancelled(tiny: GPT) -> None:
    stream = stream_ids(tiny, [65, 66], n_steps=3)
    assert "".join(stream) == "AB"
    assert stream.finish_reason == "cancelled"


def test_generate_equals_stream_equals_the_eager_ids_as_text(tiny: GPT, eager: Any) -> None:
    prompt = "hello, world"
    stream = tiny.stream(prompt, max_new_tokens=60)
    pieces = list(stream)
    assert len(pieces) > 1
    assert "".join(pieces) == tiny.generate(prompt, max_new_tokens=60) == tiny.tokenizer.decode(stream.token_ids)
    new_ids = tiny.generate_ids(tiny.tokenizer.encode(prompt), max_new_tokens=60)
    assert stream.token_ids == new_ids[: len(stream.token_ids)]


def test_the_first_piece_comes_before_the_last_token_is_made(tiny: GPT) -> None:
    stream = tiny.stream("hello", max_new_tokens=60)
    next(stream)
    assert 0 < len(stream.token_ids) < 60
    assert stream.finish_reason is None


def test_context_is_the_reason_where_overflow_stop_ended_it(tiny: GPT) -> None:
    stream = tiny.stream("hello", max_new_tokens=72, on_overflow="stop", sampling=Sampling(temperature=0))
    "".join(stream)
    assert stream.finish_reason in ("context", "eos")
    assert len(stream.prompt_token_ids) + len(stream.token_ids) <= tiny.config.context_length


def test_times_are_told_once_there_are_steps(tiny: GPT) -> None:
    stream = tiny.stream("hello", max_new_tokens=10)
    "".join(stream)
    assert stream.prefill_ms > 0
    assert stream.tokens_per_s == pytest.approx(1000 * 9 / stream.decode_ms)
    assert tiny.stream("hello", max_new_tokens=1).tokens_per_s is None


@pytest.mark.parametrize(
    ("prompt", "options", "said"),
    [
        ("", {}, "no tokens"),
        (b"hello", {}, "text is bytes"),
        (None, {}, "text is NoneType"),
        ("hello", {"stop": ""}, "stop is ''"),
        ("hello", {"stop": 3}, "stop is 3"),
        ("hello", {"max_new_tokens": -1}, "max_new_tokens is -1"),
        ("hello" * 40, {"on_overflow": "error"}, "reads at most 32"),
    ],
)
def test_wrong_arguments_raise_at_the_call_and_not_at_the_first_piece(
    tiny: GPT, prompt: Any, options: dict[str, Any], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        tiny.stream(prompt, **options)


def test_a_stream_that_is_dropped_gives_its_cache_back_at_once(tiny: GPT) -> None:
    stream = tiny.stream("hello", max_new_tokens=9)
    next(stream)
    steps = weakref.ref(stream._steps)
    gc.disable()
    try:
        del stream
        assert steps() is None
    finally:
        gc.enable()


def test_a_stream_that_has_ended_holds_no_cache(tiny: GPT) -> None:
    stream = tiny.stream("hello", max_new_tokens=9, stop=tiny.generate("hello", max_new_tokens=2)[-1])
    steps = weakref.ref(stream._steps)
    list(stream)
    assert (stream.finish_reason, steps()) == ("stop", None)


def test_behind_an_error_a_stream_gives_neither_text_nor_reason(tiny: GPT) -> None:
    asked = iter([False] * 5)
    stream = tiny.stream("hello", max_new_tokens=9, should_stop=lambda: next(asked))
    with pytest.raises(RuntimeError, match="StopIteration"):
        list(stream)
    assert (list(stream), stream.finish_reason) == ([], None)
