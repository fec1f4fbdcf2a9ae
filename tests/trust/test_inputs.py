"""Every prompt and array that a caller can pass: the eager model's answer, or a documented error."""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gptedge_runtime import GPT, BundleNotFoundError, Classifier, GptEdgeError, InputError, Sampling, load
from gptedge_runtime.bundle import ClassifierSpec
from gptedge_runtime.evaluate import evaluate
from gptedge_runtime.session import Session

BIN = Path(sys.executable).parent
INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]
TOO_LONG = pytest.param(-(10**5000), id="too long to print")
OTHERS = ["f2", "f4", "f8", "g", "c8", "c16", "?", "S3", "U3", "V4", "M8[s]", "m8[s]", "O"]


@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("layout", ["plain", "strided", "reversed", "fortran", "read-only", "unaligned"])
def test_an_integer_array_of_any_layout_is_the_same_prompt(tiny: GPT, dtype: str, order: str, layout: str) -> None:
    ids = [[1, 2, 100, 127, 5], [7, 0, 3, 3, 90]]
    array = np.array(ids).astype(order + dtype)
    if layout == "strided":
        array = np.repeat(array, 2, axis=1)[:, ::2]
    elif layout == "reversed":
        array = array[:, ::-1].copy()[:, ::-1]
    elif layout == "fortran":
        array = np.asfortranarray(array)
    elif layout == "read-only":
        array.flags.writeable = False
    elif layout == "unaligned":
        array = np.frombuffer(b"x" + array.tobytes(), array.dtype, offset=1).reshape(array.shape)
    np.testing.assert_array_equal(tiny.logits(array), tiny.logits(ids))
    assert tiny.generate_ids(array, max_new_tokens=3) == tiny.generate_ids(ids, max_new_tokens=3)


@pytest.mark.parametrize("dtype", OTHERS)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)])
def test_an_array_of_another_type_is_refused(tiny: GPT, dtype: str, shape: tuple[int, ...]) -> None:
    for call in (tiny.logits, tiny.generate_ids):
        with pytest.raises(InputError):
            call(np.zeros(shape, dtype))


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (1, 1, 1), (2, 2, 2), (1,) * 30])
def test_a_shape_that_is_no_prompt_is_refused(tiny: GPT, shape: tuple[int, ...]) -> None:
    for call in (tiny.logits, tiny.generate_ids):
        with pytest.raises(InputError):
            call(np.zeros(shape, np.int64))


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    "wrong", [-1, 270, 2**31, -(2**63), 2**64, TOO_LONG, 0.0, None, "1", True, [1], {}, b"1", np.nan]
)
def test_one_wrong_id_anywhere_is_named(tiny: GPT, position: int, wrong: Any) -> None:
    ids: list[Any] = [1, 2, 3]
    ids[position] = wrong
    for call in (tiny.logits, tiny.generate_ids):
        for prompt in (ids, [[4, 5, 6], ids]):
            with pytest.raises(InputError):
                call(prompt)


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, {1, 2}, range(3), iter([1]), b"abc", memoryview(b"abc"), lambda: 1]
)
def test_other_objects_are_prompts_or_refused(tiny: GPT, value: Any) -> None:
    try:
        answer = tiny.generate_ids(value, max_new_tokens=2)
    except InputError:
        return
    assert answer == tiny.generate_ids(list(value), max_new_tokens=2)


TEXTS = {
    "NUL": "a\0b", "BOM inside": "a\ufeffb", "BOM first": "\ufeffhello", "surrogate": "a\ud800b\udfff",
    "surrogate pair": "a\ud83d\ude00", "special token": "<|endoftext|>", "CRLF": "a\r\nb\r", "escape": "\x1b[2J",
    "bidi": "a\u202eb", "combining": "e" + "\u0301" * 500, "private": "\U0010ffff", "spaces": " " * 5000,
    "newlines": "\n" * 5000, "one letter": "a" * 1_000_000, "one sign": "^" * 1_000_000,
}  # fmt: skip


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_a_prompt_of_any_letters_comes_back_and_is_continued(tiny: GPT, text: str) -> None:
    whole = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    ids = tiny.tokenizer.encode(text)
    assert tiny.tokenizer.decode(ids) == whole
    assert 261 not in ids, "a special token inside a text is plain text"
    stream = tiny.stream(text, max_new_tokens=4)
    "".join(stream)
    assert stream.token_ids == tiny.generate_ids(ids, max_new_tokens=4)[: len(stream.token_ids)]


def test_ten_megabytes_of_one_letter_are_a_prompt(tiny: GPT) -> None:
    stream = tiny.stream("a" * 10_000_000, max_new_tokens=2)
    "".join(stream)
    assert len(stream.prompt_token_ids) == 10_000_000
    assert stream.token_ids == tiny.generate_ids([ord("a")] * 32, max_new_tokens=2)


@pytest.mark.parametrize("value", [None, 1, b"a", ["a"], bytearray(b"a"), object()])
def test_a_prompt_that_is_no_text_is_refused(tiny: GPT, value: Any) -> None:
    with pytest.raises(InputError, match="give a str"):
        tiny.generate(value)


@pytest.fixture
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that cannot run. On a GPU nothing behind it looks at ids: it would read memory beside the table."""
    for name in ("bind", "forward", "new_cache", "run", "run_long"):
        monkeypatch.delattr(Session, name)


ID_ENTRIES: dict[str, Callable[[GPT, Any], object]] = {
    "generate_ids": lambda gpt, ids: gpt.generate_ids(ids, max_new_tokens=1),
    "generate_ids, a batch": lambda gpt, ids: gpt.generate_ids([[1, 2], ids], max_new_tokens=1),
    "logits": lambda gpt, ids: gpt.logits(ids),
    "logits, a batch": lambda gpt, ids: gpt.logits([ids, ids]),
}
TEXT_ENTRIES: dict[str, Callable[[GPT, Any], object]] = {
    "generate": lambda gpt, text: gpt.generate(text, max_new_tokens=1),
    "stream": lambda gpt, text: gpt.stream(text, max_new_tokens=1),
    "a row of a batch": lambda gpt, text: gpt.request(text, max_new_tokens=1, stop=None, on_overflow="slide"),
    "evaluate": evaluate,
    "classify": lambda gpt, text: Classifier(gpt.tokenizer, gpt._session, ClassifierSpec(("a",), 0, 0)).classify(text),
}


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("ids", [[-1], [270], [2**63], [1, 2, -(2**63)], []], ids=str)
@pytest.mark.parametrize("entry", ID_ENTRIES.values(), ids=ID_ENTRIES.keys())
def test_wrong_ids_are_refused_before_any_device_sees_them(tiny: GPT, entry: Callable[..., object], ids: Any) -> None:
    with pytest.raises(InputError):
        entry(tiny, ids)


@pytest.mark.usefixtures("no_device")
@pytest.mark.parametrize("text", ["", None, b"a", 1, ["a"]], ids=str)
@pytest.mark.parametrize("entry", TEXT_ENTRIES.values(), ids=TEXT_ENTRIES.keys())
def test_wrong_texts_are_refused_before_any_device_sees_them(
    tiny: GPT, entry: Callable[..., object], text: Any
) -> None:
    with pytest.raises(InputError):
        entry(tiny, text)


@pytest.mark.parametrize("option", ["threads", "timeout_s"])
def test_a_number_too_long_to_print_is_refused(bundles: Path, option: str) -> None:
    options: dict[str, Any] = {option: -(10**5000)}
    with pytest.raises(InputError, match=f"{option} is a number of thousands of digits"):
        load(bundles / "tiny", **options)


def generated(bundles: Path, stdin: bytes, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    command: list[str | Path] = [BIN / "gptedge", "generate", bundles / "tiny", "-n", "5", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, check=False)


@pytest.mark.parametrize("stdin", [b"\xef\xbb\xbfhello\n", b"hello", b"hello\r\n"], ids=["BOM", "plain", "CRLF"])
def test_a_byte_order_mark_is_no_part_of_a_prompt(bundles: Path, tiny: GPT, stdin: bytes) -> None:
    done = generated(bundles, stdin)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode() == tiny.generate("hello", max_new_tokens=5) + "\n"


@pytest.mark.parametrize("stdin", [b"\xff", b"a\x80", b"\xed\xa0\x80", b"\xff\xfeh\0i\0", b"\xc0\xaf"])
def test_bytes_that_are_not_utf_8_are_refused_with_their_place(bundles: Path, stdin: bytes) -> None:
    done = generated(bundles, stdin)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"standard input is not UTF-8 at byte" in done.stderr


@pytest.mark.skipif(os.name == "nt", reason="arguments are not bytes on Windows")
def test_an_argument_that_is_not_utf_8_is_refused(bundles: Path) -> None:
    command = [os.fsencode(BIN / "gptedge"), b"generate", os.fsencode(bundles / "tiny"), b"a\xff"]
    done = subprocess.run(command, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr == b"error: the argument 'a\\udcff' is not UTF-8: convert it, or rename the file\n"


@pytest.mark.parametrize("name", ["max_new_tokens", "stop", "on_overflow", "sampling", "should_stop"])
@pytest.mark.parametrize("value", [-1, 1.5, "", b"", [], {}, object(), float("nan"), 10**30 - 1j, TOO_LONG])
def test_an_option_of_any_type_is_used_or_refused(tiny: GPT, name: str, value: Any) -> None:
    with pytest.raises(GptEdgeError):
        tiny.generate("hello", **{name: value})


@pytest.mark.parametrize("path", [None, 5, [], b"/bundle"])
def test_a_path_of_another_type_is_no_bundle(path: Any) -> None:
    with pytest.raises(BundleNotFoundError, match="no bundle at"):
        load(path)


@pytest.mark.parametrize("ids", [None, 5, "ab", [1.5], [[1]], [10**5000]])
def test_ids_to_decode_of_another_type_are_refused(tiny: GPT, ids: Any) -> None:
    with pytest.raises(InputError):
        tiny.tokenizer.decode(ids)


def test_rows_that_numpy_makes_no_array_of_are_refused(tiny: GPT) -> None:
    with pytest.raises(InputError, match="deque, no int array"):
        tiny.generate_ids(deque([[1], [2, 3]]))


def test_a_temperature_that_float64_does_not_hold_is_refused() -> None:
    with pytest.raises(InputError, match="temperature"):
        Sampling(temperature=10**400)


def test_a_program_that_traps_float_errors_can_draw(tiny: GPT) -> None:
    with np.errstate(all="raise"):
        assert tiny.generate("hello", max_new_tokens=3, sampling=Sampling(temperature=1e-3))


def test_standard_input_without_an_end_is_refused(bundles: Path) -> None:
    with Path("/dev/zero").open("rb") as zeros:
        done = subprocess.run([BIN / "gptedge", "generate", bundles / "tiny"], stdin=zeros, capture_output=True)
    assert (done.returncode, done.stdout) == (2, b"")
    assert b"standard input has more than 16,777,216 bytes" in done.stderr
