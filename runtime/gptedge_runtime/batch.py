"""Prompts in a file to answers in a file, in order, and on from where a killed run was cut off.

Rows are read in windows; a window is computed, appended and safe on the disk before the next one is appended. Its rows
are sorted into batches of like lengths, and no row's tokens depend on the others in its batch.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from .batch_files import Source, Target, files_beside
from .batch_parquet import import_pyarrow, is_parquet
from .batch_rows import Answer, Defaults, answer_window
from .bundle import MANIFEST, open_bundle
from .errors import InputError
from .generate import count_steps
from .gpt import GPT, load
from .inputs import read_count

WINDOW_BATCHES = 8


@dataclass(frozen=True)
class Job:
    """What to compute, and in what portions; ``threads`` are those of one process.

    ``bundle_sha256`` is the hash of the manifest, which has those of all files, as the run found it.
    """

    bundle: str
    defaults: Defaults
    batch_size: int = 32
    threads: int | None = None
    bundle_sha256: str | None = None

    def load(self) -> GPT:
        """Open the bundle, and no other that may stand there by now. Raises ``InputError``."""
        gpt = load(self.bundle, threads=self.threads)
        if hash_manifest(self.bundle) != self.bundle_sha256:
            raise InputError(f"the bundle {self.bundle} was replaced since this run began: give another OUT")
        return gpt


Engine = Callable[[Job, Source, int], Iterator[Answer]]
"""Yields the answers to the source's windows from a number on, in their order."""


def answer_here(job: Job, source: Source, first: int) -> Iterator[Answer]:
    """Compute in this process."""
    with job.load() as gpt:
        for number, window in enumerate(source.windows(first), first):
            yield answer_window(gpt, window, number * source.window_rows + 1, job.defaults, job.batch_size)


@dataclass
class Summary:
    """What a run did; ``rows_before`` were there when it began."""

    rows_before: int
    rows: int = 0
    errors: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        before = f" (and {self.rows_before:,} that were there)" if self.rows_before else ""
        speed = self.tokens / self.seconds if self.seconds else 0
        return (
            f"{self.rows:,} rows{before}, {self.errors:,} of them errors; "
            f"{self.tokens:,} tokens in {self.seconds:,.1f} s, {speed:,.0f} tokens/s"
        )


def run_batch(
    job: Job, source_path: str, target_path: str, *, engine: Engine = answer_here, progress: bool = False
) -> Summary:
    """Answer each row of a file in another; rows that are answered there already stay as they are.

    Raises ``InputError`` where the target belongs to another input, bundle or defaults, or another run writes it.
    """
    source, target = _check(job, source_path, target_path), Path(target_path)
    open_bundle(job.bundle)
    job = replace(job, bundle_sha256=hash_manifest(job.bundle))
    with Target(target, {"bundle_sha256": job.bundle_sha256} | asdict(job.defaults)) as rows:
        rows.compare_ids(source)
        summary = Summary(rows.n_rows)
        if rows.n_rows < source.count():
            _add_rows(rows, engine(job, source, rows.n_rows // source.window_rows), source, summary, progress)
        rows.finish()
    return summary


def hash_manifest(bundle: str) -> str:
    """Return the SHA-256 of a bundle's manifest."""
    return hashlib.sha256(Path(bundle, MANIFEST).read_bytes()).hexdigest()


def _add_rows(rows: Target, answers: Iterator[Answer], source: Source, summary: Summary, progress: bool) -> None:
    """Append the answers, but for the rows of the first window that are there already."""
    n_there, started = rows.n_rows % source.window_rows, time.perf_counter()
    with tqdm(desc="batch", unit=" rows", total=source.count(), initial=rows.n_rows, disable=not progress) as bar:
        for answer in answers:
            new = answer.lines[n_there:]
            rows.append(b"".join(new))
            n_there = 0
            summary.rows += len(new)
            summary.errors += answer.errors
            summary.tokens += answer.tokens
            summary.seconds = time.perf_counter() - started
            bar.set_postfix_str(f"{summary.tokens / summary.seconds:,.0f} tokens/s", refresh=False)
            bar.update(len(new))


def _check(job: Job, source_path: str, target_path: str) -> Source:
    """Refuse what would fail only after hours."""
    source = Source(Path(source_path), WINDOW_BATCHES * read_count("batch size", job.batch_size, low=1))
    read_count("max_new_tokens", job.defaults.max_new_tokens, low=0)
    if job.defaults.stop == "":
        raise InputError("stop is '': give a text of at least one character")
    count_steps([1], 0, 1, job.defaults.on_overflow)
    if not source.path.is_file():
        raise InputError(f"there is no file {source_path}: check the path")
    if any(file.exists() and file.samefile(source.path) for file in files_beside(Path(target_path))):
        raise InputError(f"{source_path} has the name of a file that goes with {target_path}: give another OUT")
    if is_parquet(Path(target_path)):
        import_pyarrow()
    return source
