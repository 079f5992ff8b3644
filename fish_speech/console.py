"""What a program prints to, terminals and pipes of any encoding, and what ends it from there."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from typing import Any


def print_anything() -> None:
    """Let no character stop the program: what the console's encoding lacks is printed as `?`."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # somebody else's stream, or none
            stream.reconfigure(errors="replace")


def words_of(error: BaseException) -> str:
    """What an error says: of the system's, the file and the reason, without their number."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename2 or error.filename}: {error.strerror.lower()}"
    return str(error)


def nobody_reads() -> None:
    """Let all that is still printed go nowhere: whoever read it wants no more, as `| head` does."""
    with suppress(OSError):  # no stream of the system's
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def some_of(names: Iterable[str], most: int = 3) -> str:
    """The first names, and how many more there are."""
    names = list(names)
    shown, more = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def stop_as_ctrl_c_does() -> None:
    """Let whatever asks the program to end interrupt it, unless it is to ignore that (nohup)."""
    for number in stop_signals():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    sys.unraisablehook = _not_lost


def _not_lost(ignored: Any) -> None:
    """Interrupt again where Python could only print that it ignored it: in a destructor, or in what
    a library in C calls. Once, lest it chase a program that is ending already."""
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    sys.unraisablehook = sys.__unraisablehook__
    if sys.is_finalizing():
        return
    again = threading.Timer(0.05, _interrupt)
    again.daemon = True
    again.start()


def _interrupt() -> None:
    if hasattr(signal, "pthread_kill"):  # which wakes what waits, too
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        _thread.interrupt_main()


def stop_signals() -> list[int]:
    """What asks a program to end: Ctrl+C, `kill` and SLURM, a closed terminal (not on Windows)."""
    return [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]
