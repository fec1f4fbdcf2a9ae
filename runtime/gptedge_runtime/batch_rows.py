"""One window of a batch: rows as JSON lines in, their answers as JSON lines out."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from .errors import GptEdgeError, InputError
from .gpt import DEFAULT_NEW_TOKENS, GPT
from .stream import Request

MAX_ROW_BYTES = 1 << 20
_FIELDS = {"id", "prompt", "max_new_tokens", "stop"}


@dataclass(frozen=True)
class Defaults:
    """What holds for rows that do not say it themselves."""

    max_new_tokens: int = DEFAULT_NEW_TOKENS
    stop: str | None = None
    on_overflow: str = "slide"


class Answer(NamedTuple):
    """A window's answers as JSON lines, and how many new tokens and rows with an error are among them."""

    lines: list[bytes]
    tokens: int
    errors: int


def answer_window(gpt: GPT, window: list[bytes], first_line: int, defaults: Defaults, batch_size: int) -> Answer:
    """Answer each line of ``window``, whose first is line ``first_line`` of the input; a bad row's answer is an error.

    An answer is ``{"id", "text", "token_ids", "finish_reason"}`` or ``{"id", "error"}``.
    """
    answers: list[dict[str, Any]] = [{"id": read_id(line)} for line in window]
    requests: dict[int, Request] = {}
    for i, line in enumerate(window):
        try:
            requests[i] = _read_request(gpt, line, defaults)
        except GptEdgeError as error:
            place = f"line {first_line + i}: " if answers[i]["id"] is None else ""
            answers[i]["error"] = f"{place}{error}"
    for batch in _batches(requests, batch_size):
        for i, done in zip(batch, gpt.generate_batch([requests[i] for i in batch]), strict=True):
            answers[i] |= {"text": done.text, "token_ids": done.token_ids, "finish_reason": done.finish_reason}
    return Answer(
        [json.dumps(answer, ensure_ascii=False).encode() + b"\n" for answer in answers],
        sum(len(answer.get("token_ids", ())) for answer in answers),
        sum("error" in answer for answer in answers),
    )


def read_id(line: bytes) -> str | int | None:
    """Return a row's id; None where it has none, or is no row."""
    try:
        value = _read_object(line).get("id")
    except InputError:
        return None
    return value if type(value) in (str, int) else None


def _read_request(gpt: GPT, line: bytes, defaults: Defaults) -> Request:
    row = _read_object(line)
    if unknown := sorted(row.keys() - _FIELDS):
        raise InputError(f"field {unknown[0]!r} is unknown: give id, prompt, max_new_tokens and stop only")
    if type(row.get("id")) not in (str, int):
        raise InputError(f"id is {_show(row, 'id')}: give each row a text or a whole number")
    if not isinstance(row.get("prompt"), str):
        raise InputError(f"prompt is {_show(row, 'prompt')}: give a text")
    given = {name: row[name] for name in ("max_new_tokens", "stop") if row.get(name) is not None}
    asked = {"max_new_tokens": defaults.max_new_tokens, "stop": defaults.stop} | given
    return gpt.request(row["prompt"], on_overflow=defaults.on_overflow, **asked)


def _read_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_ROW_BYTES:
        raise InputError(f"the row has more than {MAX_ROW_BYTES:,} bytes: shorten it")
    try:
        value = json.loads(line.decode("utf-8-sig"))
        json.dumps(value, ensure_ascii=False).encode()  # half a character, \ud800, would fail when it is written
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON in UTF-8 ({error}): write one object a line") from error
    if not isinstance(value, dict):
        raise InputError(f"the row is a {type(value).__name__}: write one JSON object a line")
    return value


def _show(row: Mapping[str, Any], name: str) -> str:
    return json.dumps(row[name])[:40] if name in row else "missing"


def _batches(requests: Mapping[int, Request], batch_size: int) -> Iterator[list[int]]:
    """Cut the rows into batches of about the same numbers of steps and prompt tokens: little is computed in vain."""
    order = sorted(requests, key=lambda i: (requests[i].n_steps, len(requests[i].prompt_token_ids)))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
