"""Run the installed commands as a user does."""

import subprocess
import sys
from pathlib import Path


def run(*args: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run a command from the environment's own folder, and return its exit code, stdout and stderr."""
    program = Path(sys.executable).parent / str(args[0])
    return subprocess.run(
        [str(program), *map(str, args[1:])], input=stdin, capture_output=True, encoding="utf-8", check=False
    )
