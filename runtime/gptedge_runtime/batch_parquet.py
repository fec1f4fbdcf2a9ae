"""Parquet files of a batch, read and written by pyarrow, some rows at a time."""

import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from .errors import InputError

_GROUP_ROWS = 8192


def is_parquet(path: Path) -> bool:
    """Tell by the file's name."""
    return path.suffix.lower() == ".parquet"


def import_pyarrow() -> Any:
    """Return pyarrow with its module for Parquet."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError('Parquet needs pyarrow: pip install "gptedge[parquet]", or give JSON lines') from error
    return pyarrow


def parquet_row_count(path: Path) -> int:
    """Return the number of rows."""
    return int(_open(path).metadata.num_rows)


def parquet_lines(path: Path) -> Iterator[bytes]:
    """Yield each row as a JSON line; a null is as good as a field that is not there."""
    file = _open(path)
    try:
        for batch in file.iter_batches(_GROUP_ROWS):
            for row in batch.to_pylist():
                values = {name: value for name, value in row.items() if value is not None}
                yield json.dumps(values, ensure_ascii=False, default=lambda value: [type(value).__name__]).encode()
    except MemoryError:
        raise
    except (import_pyarrow().ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(f"cannot read a row of {path} ({type(error).__name__}): mend the file") from error


def write_parquet(rows: Path, unfinished: Path, path: Path) -> None:
    """Write JSON lines of answers as Parquet, whole or not at all; ids are int64 if all are numbers, else strings."""
    pa = import_pyarrow()
    with rows.open("rb") as file:
        as_numbers = all(type(row["id"]) is int and abs(row["id"]) < 2**63 for row in map(json.loads, file))
    schema = pa.schema(
        {
            "id": pa.int64() if as_numbers else pa.string(),
            "text": pa.string(),
            "token_ids": pa.list_(pa.int32()),
            "finish_reason": pa.string(),
            "error": pa.string(),
        }
    )
    with rows.open("rb") as file, pa.parquet.ParquetWriter(unfinished, schema) as writer:
        while group := [json.loads(line) for line in islice(file, _GROUP_ROWS)]:
            for row in group:
                row["id"] = row["id"] if as_numbers or row["id"] is None else str(row["id"])
            writer.write_table(pa.Table.from_pylist(group, schema))
    with unfinished.open("r+b") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def _open(path: Path) -> Any:
    pa = import_pyarrow()
    try:
        return pa.parquet.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise InputError(f"{path} is not a Parquet file: {error}") from error
