"""Printing to terminals and pipes of any encoding."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise

Say = Callable[[str], None]  # how a piece of work tells the user something, a line each


def tolerate_unencodable() -> None:
    """Print characters that the console's encoding lacks as `?` instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # replaced by a stream of another class, or closed
            stream.reconfigure(errors="replace")


def say(message: str) -> None:
    """Print a line on standard error, above the progress bar where there is one."""
    from tqdm import tqdm

    tqdm.write(message, sys.stderr)


def error_message(error: BaseException) -> str:
    """An error's message; of a system error the file and the reason, without the error number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename2 or error.filename}: {error.strerror.lower()}"
    return str(error)


def refuse_empty_values(argv: Sequence[str] | None) -> None:
    """Raise `ValueError` where a flag is given an empty value, which would pass for a folder.

    `argv` None are the arguments of the program.

    (`Path("")` is the working directory. Of `--flag=--`, argparse before Python 3.12 makes a list.)
    """
    argv = sys.argv[1:] if argv is None else argv
    named = [argument.partition("=") for argument in argv if argument.startswith("--")]
    empty = [flag for flag, equals, value in named if equals and value in ("", "--")]
    empty += [flag for flag, value in pairwise(argv) if flag.startswith("-") and not value]
    if empty:
        raise ValueError(f"{empty[0]} has no value; is a shell variable not set?")


def silence_output() -> None:
    """Discard all further output: its reader has closed the pipe, as `2>&1 | head` does. What is
    still buffered would be an error at the program's end."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, AttributeError):  # no file of the system, or none at all
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def counted(number: int, noun: str) -> str:
    """A number and what there is of it: `1 clip`, `2 clips`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def shorten_list(names: Iterable[str], most: int = 3) -> str:
    """The first names, joined, and how many more there are."""
    names = list(names)
    shown, more = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown
