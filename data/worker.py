"""How a worker process of the loader lives and dies.

A worker holds the reading end of a pipe whose writing end only the trainer has: it leaves when the trainer
closes that end or dies, whatever it was doing, and at no signal. A scheduler signals every process of a job:
the trainer answers by saving, and a worker that died of the same signal would turn that into an error.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection

Lifeline = tuple[Connection, Connection]  # reading, writing end


@contextmanager
def lifeline() -> Iterator[Lifeline]:
    """In the trainer: workers started with it leave at the end of the block, or of the process."""
    ends = multiprocessing.Pipe(duplex=False)
    # an error's traceback may keep the block open; this runs before multiprocessing waits for its children
    # local names: at the interpreter's end a forgotten iterator gets here after the module's names are gone
    close, unregister = partial(_close, ends), atexit.unregister
    atexit.register(close)
    try:
        yield ends
    finally:
        unregister(close)
        close()


def hold(ends: Lifeline) -> None:
    """In a worker, at its start."""
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    reading, writing = ends
    writing.close()
    threading.Thread(target=_leave_at_the_end_of, args=(reading,), daemon=True).start()


def _leave_at_the_end_of(reading: Connection) -> None:
    reading.poll(None)
    os._exit(0)


def _close(ends: Lifeline) -> None:
    for end in ends:
        end.close()
