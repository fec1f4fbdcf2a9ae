"""Put a finished folder in place in one step, so that a kill at any moment leaves the old folder or the new one."""

import contextlib
import ctypes
import glob
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import ExportError

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def atomic_folder(target: Path, *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``target`` that takes its place when the block ends without an error.

    An existing ``target`` is replaced only if ``replace`` is true and it holds nothing, or a ``manifest.json`` and no
    file that this does not list. What killed exports left behind is removed first. Raises :class:`ExportError` where
    ``target`` cannot be written.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100 - resolve() would follow a link that is to be replaced
    _check(target, replace)
    _check_others(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        work, lock = _make_work(target)
    except OSError as error:
        raise ExportError(f"{target.parent}: cannot write there ({error.strerror}): choose another -o") from None
    with lock:
        try:
            yield work
            for path in [*work.rglob("*"), work]:
                _sync(path)
            _check(target, replace)
            _swap(work, target, replace)
            _sync(target.parent)
        except OSError as error:
            raise ExportError(
                f"{target}: cannot write the bundle ({error.strerror or error}): make room there, or choose another -o"
            ) from None
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _check(target: Path, replace: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ExportError(f"{target} exists and is no folder: choose another -o")
    if not target.is_dir() or not any(target.iterdir()):
        return
    if _listed(target) is None:
        raise ExportError(f"{target} exists and is no bundle: choose another -o, or remove it")
    if not replace:
        raise ExportError(f"{target} exists: use --force to replace it, or choose another -o")


def _listed(target: Path) -> set[str] | None:
    """Return the names of a bundle's files by its manifest; None where it has none."""
    try:
        manifest = json.loads((target / "manifest.json").read_bytes())
        return {"manifest.json", *(file["path"] for file in manifest["files"] if manifest["format_version"])}
    except (OSError, ValueError, RecursionError, TypeError, LookupError):
        return None


def _check_others(target: Path) -> None:
    """Refuse to replace, and so to remove, what is no file of a bundle."""
    listed = _listed(target) or set()
    for path in target.rglob("*"):
        if (path.is_symlink() or not path.is_dir()) and (name := path.relative_to(target).as_posix()) not in listed:
            raise ExportError(f"{target} holds {name}, which is no part of its bundle: move it, or choose another -o")


def _make_work(target: Path) -> tuple[Path, contextlib.ExitStack]:
    """Make and lock the folder to work in; until it is locked, another export may take it for a leftover."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.tmp-", dir=target.parent))
        lock = contextlib.ExitStack()
        with contextlib.suppress(FileNotFoundError, BlockingIOError):
            lock.enter_context(_lock(work))
            work.chmod(0o755)
            return work, lock


def _swap(work: Path, target: Path, replace: bool) -> None:
    """Exchange the two names in one system call where there is one; elsewhere two renames leave a gap."""
    if not replace or not target.exists():
        work.rename(target)  # fails where another export has put a bundle there in the meantime
        return
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        names = os.fsencode(work), os.fsencode(target)
        if libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return
    old = work.with_name(work.name + "-old")
    target.rename(old)
    work.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if sys.platform == "win32" and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(target: Path) -> None:
    """A folder whose lock can be had belongs to an export that is no longer alive."""
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.tmp-*"):
        with contextlib.suppress(OSError), _lock(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the system lets go of it however the process ends."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
