"""Work spread over processes, which end with the run that started them."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from threading import Thread, current_thread, main_thread
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from fish_speech import resources

if TYPE_CHECKING:
    from multiprocessing.synchronize import Semaphore

_Job = TypeVar("_Job")
_Result = TypeVar("_Result")


def in_processes(
    function: Callable[[_Job], _Result], jobs: list[_Job], num_workers: int, *, desc: str
) -> Iterator[_Result]:
    """Yield `function` of every job as it is done, here or in `num_workers` processes.

    0 means as many as are worth their start. `desc` names the progress bar.
    """
    workers = min(len(jobs), num_workers or min(resources.available_cores(), 1 + len(jobs) // 16))
    if sys.platform == "win32":
        workers = min(workers, 61)  # which is all that Windows waits for at once
    if not jobs:  # nor a progress bar
        return
    with tqdm(total=len(jobs), desc=desc, unit="file", disable=None) as progress:
        if workers <= 1:
            for job in jobs:
                yield function(job)
                progress.update()
            return
        context = get_context("spawn")
        started = context.Semaphore(0)
        pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(started,))
        finished = False
        try:
            with _interrupt_deferred():
                futures = [pool.submit(function, job) for job in jobs]
            for future in as_completed(futures):
                yield future.result()
                progress.update()
            finished = True
        except BrokenProcessPool as error:
            if started.acquire(block=False):
                remedy = "; with less memory use --num-workers 1"
            else:  # each process runs the script that started it up to there
                remedy = " at its start: put what your script does under if __name__ == '__main__':"
            raise ValueError(f"a worker process died{remedy}") from error
        finally:
            if not finished:  # else the jobs at hand would be waited for
                for worker in list((pool._processes or {}).values()):
                    worker.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


def die_with_parent() -> None:
    """Make a worker end at once with the run that started it: by Ctrl+C, or however it dies."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    Thread(target=watch, daemon=True).start()


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Hold Ctrl+C back: here, and in processes started meanwhile until they are ready for it."""
    if not hasattr(signal, "pthread_sigmask") or current_thread() is not main_thread():
        yield  # Windows has no such thing; other threads are never interrupted
        return
    received: list[tuple] = []  # blocked is the main thread alone: the kernel may choose another
    handler = signal.signal(signal.SIGINT, lambda *what: received.append(what))
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        signal.signal(signal.SIGINT, handler)
        if received and callable(handler):
            handler(*received[0])


def _start_worker(started: Semaphore) -> None:
    die_with_parent()
    if hasattr(signal, "pthread_sigmask"):  # ready for what was held back
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    started.release()
