"""How the programs end, and print to terminals and pipes of any encoding."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import pairwise

Say = Callable[[str], None]  # how a piece of work tells the user something, a line each


def run_program(
    parse: Callable[[Sequence[str] | None], Namespace],
    work: Callable[[Namespace], int],
    argv: Sequence[str] | None,
    *,
    interrupted: Callable[[], object],
) -> int:
    """The exit status of a program: that of `work`, given the arguments parsed; 2 where that ends
    in an error, 130 where it is interrupted, which `interrupted` tells the user.

    `argv` None are the arguments of the process.
    """
    args = None
    try:
        if sys.stderr is None:  # closed; `print` would take standard output, and tqdm fail
            sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        tolerate_unencodable()
        args = parse(argv)
        refuse_empty_values(argv)
        status = work(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        silence_output()
        return 1
    except SystemExit:
        raise
    except BaseException as error:  # out of memory, a driver's failure, a panic of Rust code, ...
        if is_interrupt(error):
            interrupted()
            return 130
        if args is None:
            raise
        if args.debug:
            traceback.print_exc()
        complain(error)
        return 2


def is_interrupt(error: BaseException | None) -> bool:
    """Whether it came of Ctrl+C, also through a library that failed while it cleaned up."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__context__
    return error is not None


def tolerate_unencodable() -> None:
    """Print characters that the console's encoding lacks as `?` instead of raising an error."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # replaced by a stream of another class, or closed
            stream.reconfigure(errors="replace")


def say(message: str) -> None:
    """Print a line on standard error, above the progress bar where there is one."""
    from tqdm import tqdm

    tqdm.write(message, sys.stderr)


def complain(error: BaseException) -> None:
    """Print an error as the user can read it."""
    what = error_message(error) or type(error).__name__
    if isinstance(error, OSError) and error.errno == errno.ENOSPC and error.filename:
        what += "; make room, and the same command goes on from there"
    if not isinstance(error, ValueError | OSError | MemoryError):  # a mistake of ours
        what = f"{type(error).__name__}: {what} (--debug shows where)"
    with suppress(OSError):  # nobody can be told then
        print(f"error: {what}", file=sys.stderr, flush=True)


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
