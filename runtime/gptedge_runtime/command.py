"""How a command ends: one line on stderr where something is wrong, and an exit code that tells whose it is to mend."""

import contextlib
import io
import os
import sys
import traceback
from pathlib import Path

import click

from .errors import GptEdgeError, one_line


def run(command: click.Command, name: str, arguments: list[str]) -> int:
    """Run a command and return its exit code.

    0 done, 1 our bug, 2 the user's to mend (options, files, input, machine), 3 verification failed, 130 interrupted.
    """
    _open_standard_files()
    if sys.stdout is None:
        return _fail("standard output is closed: send it to a file or a pipe", 2)
    for argument in arguments:
        if any("\ud800" <= letter <= "\udfff" for letter in argument):  # what Python makes of other bytes
            return _fail(f"the argument {argument!r:.80} is not UTF-8: convert it, or rename the file", 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
    try:
        with command.make_context(name, arguments) as context:
            command.invoke(context)
        sys.stdout.flush()
    except click.exceptions.Exit as end:
        return end.exit_code
    except BrokenPipeError:  # the reader has seen enough
        _abandon_stdout()
        return 0
    except (Exception, KeyboardInterrupt) as error:
        return _explain(error)
    return 0


def write(text: str) -> None:
    """Write text to stdout and flush; on a terminal its control characters are shown, and not obeyed."""
    sys.stdout.write(escape(text) if sys.stdout.isatty() else text)
    sys.stdout.flush()


def say(line: str) -> None:
    """Write a line to stderr, if it takes one: what it says must not end the command otherwise."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


def escape(text: str) -> str:
    """Return ``text`` with the control characters other than newline and tab as ``\\x1b`` and the like."""
    return "".join(c if c in "\n\t" or not _is_control(c) else f"\\x{ord(c):02x}" for c in text)


def _open_standard_files() -> None:
    """Take the numbers 0, 1 and 2 where they are closed, or a bundle's file would get what is meant for a terminal."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115 - for as long as the process lives


def _is_control(letter: str) -> bool:
    return letter < " " or "\x7f" <= letter <= "\x9f"


def _explain(error: BaseException) -> int:
    if isinstance(error, click.ClickException):
        return _fail(f"{error.format_message().rstrip('.')}: see --help", 2)
    if isinstance(error, GptEdgeError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return _fail("interrupted", 130)
    if isinstance(error, MemoryError) or "allocate memory" in str(error):  # the second is PyTorch's RuntimeError
        return _fail("out of memory: end other programs, or take a smaller bundle, prompt or batch", 2)
    if isinstance(error, OSError):
        _abandon_stdout()
        nameless = "the working folder" if isinstance(error, FileNotFoundError) else "standard output"
        place, why = error.filename or nameless, error.strerror or error
        return _fail(f"cannot use {place} ({why}): check that it can be read, or written and is not full", 2)
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return _fail(f"a bug in gptedge: {type(error).__name__} at {place}: {error}: please report this line", 1)


def _abandon_stdout() -> None:
    """Let Python's last flush of what could not be written go nowhere, instead of failing once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str, exit_code: int) -> int:
    say(f"error: {one_line(message)}")
    return exit_code
