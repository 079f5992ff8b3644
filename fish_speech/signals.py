"""How a program is interrupted: every signal that asks it to end acts as Ctrl+C does."""

from __future__ import annotations

import _thread
import os
import signal
import sys
import threading
from types import FrameType


def exit_on_termination() -> None:
    """End at once, without a word, on the `stop_signals`: while a program is being imported nothing
    has to be put in order, and `KeyboardInterrupt` would be a traceback."""
    _handle_stop_signals(lambda *_: os._exit(130))


def interrupt_on_termination() -> None:
    """Turn the `stop_signals` into `KeyboardInterrupt`."""
    _handle_stop_signals(_interrupt_outside_imports)
    sys.unraisablehook = _reraise_interrupt


def _handle_stop_signals(handler: object) -> None:
    for number in filter(_is_heeded, stop_signals()):
        signal.signal(number, handler)


def _interrupt_outside_imports(number: int, frame: FrameType | None) -> None:
    """Raise `KeyboardInterrupt`, but once an import that is going on is over: in it NumPy raises
    another error for it, others swallow it or abort."""
    outer = frame
    while outer is not None and not outer.f_code.co_filename.startswith("<frozen importlib"):
        outer = outer.f_back
    if outer is None:
        raise KeyboardInterrupt
    _send_soon(number)


def _reraise_interrupt(ignored: sys.UnraisableHookArgs) -> None:
    """Interrupt once more where Python ignored it: in a destructor, or in a callback from C.

    Only once, so as not to disturb a program that is already ending.
    """
    if not issubclass(ignored.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(ignored)
        return
    sys.unraisablehook = sys.__unraisablehook__
    if sys.is_finalizing():
        return
    _send_soon(next(filter(_is_heeded, stop_signals()), signal.SIGINT))


def _is_heeded(number: int) -> bool:
    return signal.getsignal(number) != signal.SIG_IGN  # as nohup has it


def _send_soon(number: int) -> None:
    again = threading.Timer(0.05, _send, [number])
    again.daemon = True
    again.start()


def _send(number: int) -> None:
    if hasattr(signal, "pthread_kill"):  # it also wakes a thread that waits
        signal.pthread_kill(threading.main_thread().ident, number)
    else:
        _thread.interrupt_main(number)


def stop_signals() -> list[int]:
    """Signals that end a program: Ctrl+C; `kill` and SLURM; a closed terminal (not on Windows)."""
    return [
        getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
    ]
