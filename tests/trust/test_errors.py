"""The error contract of both commands: an exit code that tells whose it is to mend, and one line on stderr."""

import errno
import os
import pty
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from gptedge_runtime import (
    BundleError,
    BundleNotFoundError,
    GptEdgeError,
    InputError,
    OutOfMemoryError,
    ProviderError,
    TimeLimitError,
    VerificationError,
)
from gptedge_runtime.command import escape, run

Edit = Callable[[Callable[[dict[str, Any]], object]], Path]

BIN = Path(sys.executable).parent


def ending(error: BaseException) -> click.Command:
    """A command that ends with this error."""

    @click.command()
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BundleError("cause: remedy"), 2, "cause: remedy"),
        (BundleNotFoundError("cause: remedy"), 2, "cause: remedy"),
        (InputError("cause: remedy"), 2, "cause: remedy"),
        (ProviderError("cause: remedy"), 2, "cause: remedy"),
        (OutOfMemoryError("cause: remedy"), 2, "cause: remedy"),
        (TimeLimitError("cause: remedy"), 2, "cause: remedy"),
        (VerificationError("cause: remedy"), 3, "cause: remedy"),
        (click.UsageError("No such option"), 2, "No such option: see --help"),
        (click.FileError("x", "gone"), 2, "gone"),
        (MemoryError(), 2, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "standard output (No space left on device)"),
        (PermissionError(errno.EACCES, "Permission denied", "/etc/x"), 2, "/etc/x (Permission denied)"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (RecursionError("too deep"), 1, "RecursionError at test_errors.py:"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), 1, "UnicodeDecodeError at test_errors.py:"),
        (AssertionError("\x1b[31m\n\nlines " + "x" * 1000), 1, "AssertionError at test_errors.py:"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_any_error_ends_a_command_with_its_code_and_one_line(error: BaseException, code: int, said: str) -> None:
    # in a child, since a command that fails to write gives its standard output up
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115 - pytest has replaced it
        os._exit(run(ending(error), "x", []))
    os.close(write)
    with os.fdopen(read) as stream:
        lines = stream.read().splitlines()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert said in lines[0]
    assert len(lines[0]) <= 300
    assert lines[0].isprintable()


@pytest.mark.parametrize(
    ("error", "builtin"),
    [
        (BundleNotFoundError, FileNotFoundError),
        (InputError, ValueError),
        (ProviderError, RuntimeError),
        (OutOfMemoryError, MemoryError),
        (TimeLimitError, TimeoutError),
    ],
)
def test_errors_are_also_the_builtins_that_programs_expect(error: type[GptEdgeError], builtin: type[Exception]) -> None:
    assert issubclass(error, builtin)
    assert str(error("text")) == "text"


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        ["sh", "-c", line], capture_output=True, check=False, env=os.environ | environment, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{bin}/gptedge generate {tiny} hi >&-", "standard output is closed"),
        ("{bin}/gptedge generate {tiny} <&-", "standard input is closed"),
        ("{bin}/gptedge info {tiny} >/dev/full", "standard output (No space left on device)"),
        ("{bin}/gptedge --help >/dev/full", "standard output (No space left on device)"),
        ("cd {empty} && rmdir {empty} && {bin}/gptedge web {tiny}", "the working folder (No such file or directory)"),
        ("{bin}/gptedge generate {tiny} \"$(printf 'a\\377')\"", "is not UTF-8"),
    ],
)
def test_what_is_wrong_around_the_process_is_one_line(bundles: Path, tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "empty").mkdir()
    done = shell(line.format(bin=BIN, tiny=bundles / "tiny", empty=tmp_path / "empty"))
    assert (done.returncode, done.stdout) == (2, b"")
    (message,) = done.stderr.decode().splitlines()
    assert said in message


HUGE = "9" * 24


@pytest.mark.parametrize(
    "line",
    [
        f"gptedge batch {{tiny}} {{empty}} out --batch-size {HUGE}",
        f"gptedge batch {{tiny}} {{empty}} out --max-new-tokens {HUGE}",
        f"gptedge bench {{tiny}} --batch {HUGE}",
        f"gptedge bench {{tiny}} --lengths {HUGE}",
        f"gptedge bench {{tiny}} --repeats {HUGE}",
        f"gptedge eval {{tiny}} {{empty}} --stride {HUGE}",
        f"gptedge generate {{tiny}} hi --max-new-tokens {HUGE}",
        f"gptedge generate {{tiny}} hi --timeout-s {HUGE}",
    ],
)
def test_a_number_that_no_use_needs_is_one_line(bundles: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "empty").touch()
    done = shell(f"cd {tmp_path} && {BIN}/" + line.format(tiny=bundles / "tiny", empty="empty"))
    assert (done.returncode, done.stdout) == (2, b"")
    (message,) = done.stderr.decode().splitlines()
    assert ": give a" in message


@pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files stands for a full disk")
@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("export-hf random --config config.json --tokenizer bytes -o out", "out"),
        ("gptedge batch {tiny} in.jsonl out.jsonl", "out.jsonl.job.json"),
        ("gptedge bench {tiny} --lengths 8 -n 2 --repeats 1 --plot out.svg", "out.svg"),
    ],
    ids=["export-hf", "batch", "bench"],
)
def test_a_full_disk_is_one_line_that_names_the_file(bundles: Path, tmp_path: Path, line: str, named: str) -> None:
    (tmp_path / "in.jsonl").write_text('{"id": 1, "prompt": "hi"}\n')
    (tmp_path / "config.json").write_text(
        '{"vocab_size": 257, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 1}'
    )
    done = shell(f"cd {tmp_path} && trap '' XFSZ && ulimit -f 0 && {BIN}/" + line.format(tiny=bundles / "tiny"))
    assert (done.returncode, done.stdout) == (2, b"")
    (message,) = done.stderr.decode().splitlines()
    assert named in message


def test_closed_standard_files_are_not_taken_by_the_bundles(bundles: Path) -> None:
    done = shell(f"{BIN}/gptedge generate {bundles / 'tiny'} hi -n 3 <&- 2>&-")
    assert done.returncode == 0
    assert done.stdout.endswith(b"\n")


@pytest.mark.parametrize("letter", [*map(chr, [*range(32), *range(127, 160)])])
def test_control_characters_are_shown_on_a_terminal(letter: str) -> None:
    shown = letter if letter in "\n\t" else f"\\x{ord(letter):02x}"
    assert escape(f"a{letter}ü😀\u202e") == f"a{shown}ü😀\u202e"


def test_a_terminal_gets_no_control_characters_of_the_text(bundle: Path, edit: Edit) -> None:
    """The version that a manifest claims is a terminal sequence: shown on a terminal, as it is in a pipe."""
    edit(lambda manifest: manifest.update(gptedge_version="\x1b]0;evil\x07"))
    main, side = pty.openpty()
    with subprocess.Popen([BIN / "gptedge", "info", bundle], stdout=side, stderr=side, stdin=side) as running:
        os.close(side)
        shown = b""
        while chunk := _read(main):
            shown += chunk
    assert running.returncode == 0
    assert b"\x1b" not in shown
    assert b"\\x1b]0;evil\\x07" in shown
    assert b"\x1b]0;evil\x07" in shell(f"{BIN}/gptedge info {bundle}").stdout


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 4096)
    except OSError:  # how a terminal says that nobody writes to it any more
        return b""


@pytest.mark.parametrize(("line", "code"), [("info /nowhere", 2), ("batch {tiny} {empty} {out}", 0)])
def test_a_full_standard_error_changes_no_exit_code(bundles: Path, tmp_path: Path, line: str, code: int) -> None:
    (tmp_path / "in.jsonl").touch()
    line = line.format(tiny=bundles / "tiny", empty=tmp_path / "in.jsonl", out=tmp_path / "out.jsonl")
    assert shell(f"{BIN}/gptedge {line} 2>/dev/full").returncode == code
