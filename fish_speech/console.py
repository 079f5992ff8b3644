"""What a program prints to, terminals and pipes of any encoding, and what ends it from there."""

from __future__ import annotations

import signal
import sys
from contextlib import suppress


def print_anything() -> None:
    """Let no character stop the program: what the console's encoding lacks is printed as `?`."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # somebody else's stream, or none
            stream.reconfigure(errors="replace")


def stop_signals() -> list[int]:
    """What asks a program to end: Ctrl+C, `kill` and SLURM, a closed terminal (not on Windows)."""
    return [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]
