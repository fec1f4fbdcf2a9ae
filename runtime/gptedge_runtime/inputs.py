"""Check what a caller hands over: past this, token ids are lists of ints inside the vocabulary."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import InputError, shown

MAX_COUNT = 2**31 - 1
"""Far above any use, and nowhere too large for the C code that counts."""

TokenIds = Sequence[int] | Sequence[Sequence[int]] | NDArray[np.integer[Any]]


def read_rows(token_ids: TokenIds, vocab_size: int) -> tuple[list[list[int]], bool]:
    """Return the prompts as rows of ints, and whether they were a batch: a list of lists, or an array of two axes.

    Raises :class:`InputError` for an empty prompt and for ids that are not whole numbers inside the vocabulary.
    """
    values = _as_list(token_ids)
    is_batch = bool(values) and isinstance(values[0], list | tuple | np.ndarray)
    rows = [_as_list(row) for row in values] if is_batch else [values]
    return [_check_row(row, vocab_size) for row in rows], is_batch


def read_count(name: str, value: int, *, low: int) -> int:
    """Return a whole number from ``low`` to ``MAX_COUNT``; raises :class:`InputError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= MAX_COUNT:
        raise InputError(f"{name} is {shown(value)}: give a whole number from {low} to {MAX_COUNT:,}")
    return int(value)


def _as_list(values: Any) -> list[Any]:
    if isinstance(values, list | tuple):
        return list(values)
    try:
        array = np.asarray(values)
    except Exception as error:  # a tensor's own, or numpy's for rows of different lengths
        raise InputError(f"token ids are {type(values).__name__}, no int array: give lists of ints") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise InputError(f"token ids are {type(values).__name__}: give a list of ints, lists of ints, or an int array")
    ids: list[Any] = array.tolist()
    return ids


def _check_row(row: list[Any], vocab_size: int) -> list[int]:
    if not row:
        raise InputError("the prompt has no tokens: give at least one")
    for token_id in row:
        if isinstance(token_id, bool) or not isinstance(token_id, int | np.integer):
            raise InputError(f"token id {shown(token_id)} is {type(token_id).__name__}: give whole numbers")
        if not 0 <= token_id < vocab_size:
            raise InputError(
                f"token id {shown(token_id)} is outside the vocabulary 0..{vocab_size - 1}: give ids inside it"
            )
    return [int(token_id) for token_id in row]
