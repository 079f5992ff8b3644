"""How a program is interrupted: every signal that asks it to end acts as Ctrl+C does."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from typing import Any


def interrupt_on_termination() -> None:
    """Turn the `stop_signals` into `KeyboardInterrupt`, except those that are ignored (nohup)."""
    for number in stop_signals():
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    sys.unraisablehook = _reraise_interrupt


def _reraise_interrupt(ignored: Any) -> None:
    """Interrupt once more where Python ignored it: in a destructor, or in a callback from C.

    Only once, so as not to disturb a program that is already ending.
    """
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
    if hasattr(signal, "pthread_kill"):  # it also wakes a thread that waits
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    else:
        _thread.interrupt_main()


def stop_signals() -> list[int]:
    """Signals that end a program: Ctrl+C; `kill` and SLURM; a closed terminal (not on Windows)."""
    return [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]
