"""Tasks are prepared in a thread while the model loads or answers: a GPU need not wait for prompts."""

import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .items import Item
from .questions import Questions

WINDOW_ITEMS = 1024  # items sorted by length together; more pad less and hold more memory
WINDOW_TOKENS = 2**18
WINDOWS_AHEAD = 32  # whole tasks among them where those are short
TASKS_AHEAD = 4  # begun before the one that is answered has ended; each holds its data
PATIENCE = 1.0  # seconds that an ended run waits for its thread to notice
END = object()


@dataclass(frozen=True)
class Window:
    """Items with the names of their answers, and the order in which they make up batches.

    That is by kind and length of what is read, the longest first: what does not fit fails early. Options of
    one question stay together, as a batch reads their context once.
    """

    items: list[Item]
    names: list[str]
    order: list[int]


class Ahead:
    """The questions of several tasks, each begun when those before are written, whether answered or not.

    All tasks share one thread, so that what they change in libraries for a while is changed by one at a time.

    Args:
        prepare: makes the questions of each task.
        identity: of the model whose answers are named.
    """

    def __init__(self, prepare: Sequence[Callable[[], Questions]], identity: str) -> None:
        self._identity = identity
        self._made: queue.Queue[tuple[int, Any]] = queue.Queue(maxsize=WINDOWS_AHEAD)
        self._current = -1  # the task that is answered
        self._room = threading.Semaphore(TASKS_AHEAD)
        self._stopped = threading.Event()
        # a daemon: a download, or a prompt of a million tokens, need not be waited for
        self._thread = threading.Thread(target=self._prepare_all, args=(prepare,), daemon=True)
        self._thread.start()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join(PATIENCE)

    def begin(self) -> Questions:
        """Those of the next task; what is left of the one before is dropped.

        Raises:
            Exception: what kept them from being made.
        """
        self._current += 1
        self._room.release()
        return self._take()

    def windows(self) -> Iterator[Window]:
        """The items of the task that was begun. Raises what kept them from being made."""
        while (window := self._take()) is not END:
            yield window

    def _take(self) -> Any:
        while True:
            task, made = self._made.get()
            if task < self._current:
                continue
            if isinstance(made, BaseException):
                raise made
            return made

    def _prepare_all(self, prepare: Sequence[Callable[[], Questions]]) -> None:
        for task, questions in enumerate(prepare):
            while not self._room.acquire(timeout=0.1) and self._wanted(task):
                pass
            if not self._wanted(task):
                return
            try:
                self._prepare(task, questions)
            except BaseException as error:  # its own task's, when that is begun
                self._put(task, error)

    def _prepare(self, task: int, prepare: Callable[[], Questions]) -> None:
        questions = prepare()
        self._put(task, questions)
        items = itertools.takewhile(lambda _: self._wanted(task), questions.items)
        for window in windows_of(items, self._identity):
            self._put(task, window)
        self._put(task, END)

    def _wanted(self, task: int) -> bool:
        return task >= self._current and not self._stopped.is_set()

    def _put(self, task: int, made: Any) -> None:
        while self._wanted(task):
            try:
                return self._made.put((task, made), timeout=0.1)
            except queue.Full:
                continue


def windows_of(items: Iterable[Item], identity: str) -> Iterator[Window]:
    window: list[Item] = []
    tokens = 0
    for item in items:
        window.append(item)
        tokens += item.size
        if len(window) >= WINDOW_ITEMS or tokens >= WINDOW_TOKENS:
            yield _window(window, identity)
            window, tokens = [], 0
    if window:
        yield _window(window, identity)


def _window(items: list[Item], identity: str) -> Window:
    places = [(item.kind, item.continuation - item.size, -item.size) for item in items]
    order = sorted(range(len(items)), key=places.__getitem__)
    return Window(items, [item.fingerprint(identity) for item in items], order)
