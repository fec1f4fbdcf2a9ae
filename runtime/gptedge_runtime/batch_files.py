"""The files of a batch: rows are read in windows, answers appended so that a kill at any moment loses none."""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from itertools import islice
from pathlib import Path
from typing import Any

from .batch_parquet import is_parquet, parquet_lines, parquet_row_count, write_parquet
from .batch_rows import MAX_ROW_BYTES, read_id
from .errors import InputError

_BLOCK = 1 << 20


@dataclass(frozen=True)
class Source:
    """Rows in a file, JSON lines or Parquet, read in windows of ``window_rows``."""

    path: Path
    window_rows: int

    def lines(self) -> Iterator[bytes]:
        """Yield each row as a JSON line without its newline; of one that is too long, only its beginning."""
        return parquet_lines(self.path) if is_parquet(self.path) else _lines(self.path)

    def windows(self, first: int) -> Iterator[list[bytes]]:
        """Yield the windows from number ``first`` on."""
        lines = islice(self.lines(), first * self.window_rows, None)
        while window := list(islice(lines, self.window_rows)):
            yield window

    def count(self) -> int:
        """Return the number of rows."""
        if is_parquet(self.path):
            return parquet_row_count(self.path)
        n_lines, last = 0, b"\n"
        with self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                n_lines, last = n_lines + block.count(b"\n"), block
        return n_lines + (not last.endswith(b"\n"))


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while line := file.readline(MAX_ROW_BYTES + 2):
            rest = line
            while rest and not rest.endswith(b"\n"):
                rest = file.readline(_BLOCK)
            yield line.removesuffix(b"\n")


def files_beside(path: Path) -> list[Path]:
    """Return what a run writes beside its answers: the job, and for Parquet the rows and the file that becomes it."""
    return [Path(f"{path}.{end}") for end in ("job.json", "rows.jsonl", "tmp")[: 3 if is_parquet(path) else 1]]


class Target:
    """The file of answers, one JSON line each in the order of the input, written by one run at a time.

    ``n_rows`` of them are complete. ``job`` says what they depend on; it stands in ``OUT.job.json``, and only a run
    with the same job adds answers. A Parquet file is made at the end, from JSON lines that stand in ``OUT.rows.jsonl``.
    Raises :class:`InputError`.
    """

    def __init__(self, path: Path, job: dict[str, Any]) -> None:
        self._path = path
        self._job_path, *others = files_beside(path)
        self._rows_path, self._unfinished = others or (path, path)
        if self._rows_path.exists() and not self._rows_path.is_file():  # a device may hold rows without end
            raise InputError(f"{self._rows_path} is no plain file: give another OUT")
        try:
            self._file = self._rows_path.open("a+b", buffering=0)
        except OSError as error:
            raise self._cannot_write(error) from error
        try:
            _lock(self._file, path)
            self._compare_job(job)
            self.n_rows = self._cut_torn_row()
        except BaseException:
            self._file.close()
            raise

    def compare_ids(self, source: Source) -> None:
        """Refuse the input if the rows that are complete are not the answers to its first rows."""
        lines = source.lines()
        with self._rows_path.open("rb") as rows:
            for number, row in enumerate(rows, 1):
                line = next(lines, None)
                if line is None or self._read_id(row, number) != read_id(line):
                    raise InputError(
                        f"line {number} of {self._rows_path} does not answer line {number} of {source.path}: "
                        "it belongs to another input: give another OUT, or delete it"
                    )

    def _read_id(self, row: bytes, number: int) -> Any:
        try:
            return json.loads(row)["id"]
        except (ValueError, RecursionError, TypeError, LookupError) as error:
            raise InputError(
                f"line {number} of {self._rows_path} is no answer: it was changed: give another OUT, or delete it"
            ) from error

    def append(self, lines: bytes) -> None:
        """Add answers and return when they are on the disk."""
        rest = memoryview(lines)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._cannot_write(error) from error

    def finish(self) -> None:
        """Make the Parquet file, if that is what was asked for."""
        if self._path == self._rows_path:
            return
        try:
            write_parquet(self._rows_path, self._unfinished, self._path)
        except OSError as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> "Target":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _cut_torn_row(self) -> int:
        """Cut off what was half written when a run was killed; return the number of rows before it."""
        n_rows = end = 0
        with self._rows_path.open("rb") as rows:
            for row in rows:
                if row.endswith(b"\n"):
                    n_rows, end = n_rows + 1, end + len(row)
        self._file.truncate(end)
        return n_rows

    def _compare_job(self, job: dict[str, Any]) -> None:
        """Refuse what was begun as another job, or not by this command; begin anew by writing the job down."""
        begun = _read_job(self._job_path)
        if not any(file.exists() and file.stat().st_size for file in (self._path, self._rows_path)):
            if begun is None:
                raise InputError(f"{self._job_path} is no job of this command: give another OUT")
            return _write_job(self._job_path, job)
        if not begun:
            raise InputError(f"{self._path} holds something, and no {self._job_path} says what: give another OUT")
        for name, value in job.items():
            if begun.get(name) != value:
                raise InputError(
                    f"{self._path} was begun with {name} {str(begun.get(name))[:16]!r}, now it is "
                    f"{str(value)[:16]!r}: give the same as then, or another OUT"
                )
        return None

    def _cannot_write(self, error: OSError) -> InputError:
        return InputError(
            f"cannot write {self._path} ({error.strerror}): make it possible and run this again, or give another OUT"
        )


def _lock(file: FileIO, path: Path) -> None:
    """Take the file for this process; the system gives it back however the process ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 40)  # far behind the rows: Windows lets nobody read what is locked
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise InputError(f"another run writes {path}: wait for its end, or give another OUT") from error


def _read_job(path: Path) -> dict[str, Any] | None:
    """Return the job in this file, empty where there is none or it was cut off; None where something else is there."""
    begin = '{\n  "bundle_sha256": "'
    try:
        text = path.read_text("utf-8", "replace")
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): make it possible, or give another OUT") from error
    try:
        job = json.loads(text)
    except (ValueError, RecursionError):
        return {} if text.startswith(begin) or begin.startswith(text) else None
    return job if isinstance(job, dict) and "bundle_sha256" in job else None


def _write_job(path: Path, job: dict[str, Any]) -> None:
    try:
        with path.open("w", encoding="utf-8") as file:
            json.dump(job, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): make it possible, or give another OUT") from error
