"""``python -m gptedge_runtime`` is the command ``gptedge``."""

from .cli import main

main()
