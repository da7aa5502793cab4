"""Runs items through one model: what is already answered is skipped, the rest is batched, answered, kept."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from .ahead import Ahead, Window
from .items import Item
from .keeping import Keeping
from .questions import Questions
from .store import Record, Store

T = TypeVar("T")


class Session:
    """One model, its kept answers, and the time spent inside and outside of it.

    As a context manager it ends when all answers are kept, also if it is interrupted.

    Args:
        model: an EvalModel or a scripted one.
        identity: a text that is the same for the same weights.
    """

    def __init__(self, model: Any, store: Store, identity: str, *, quiet: bool = False) -> None:
        self.model = model
        self.store = store
        self.identity = identity
        self.quiet = quiet
        self.model_seconds: dict[str, float] = {}
        self.seconds: dict[str, float] = {}
        self._pool = ThreadPoolExecutor(1)

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def run(self, task: str, items: Iterable[Item], total: int | None = None) -> list[Record]:
        """The records of all items, in their order. Raises as `answer` and its future do."""
        return self.ask(task, lambda: Questions(items, total))

    def ask(self, task: str, prepare: Callable[[], Questions]) -> list[Record]:
        """The results of a task by itself."""
        began = time.perf_counter()
        with Ahead([prepare], self.identity) as ahead:
            results = self.answer(task, ahead, list).result()
        self.seconds[task] = self.seconds.get(task, 0.0) + time.perf_counter() - began
        return results

    def answer(self, task: str, ahead: Ahead, then: Callable[[list[Record]], T]) -> "Future[T]":
        """What `then` makes of the results of the next task of `ahead`, which all has been asked then.

        Raises, as may the future:
            ValueError: an item that is longer than its budget, the tokenizer or the model allows.
            MemoryError: an item that does not fit the memory.
            OSError: answers cannot be written.
        """
        questions = ahead.begin()
        keeping = Keeping(task, questions, self.store, self._pool)
        with tqdm(total=questions.total, desc=task, unit="item", disable=self.quiet) as progress:
            asked = 0
            for window in ahead.windows():
                self._window(window, keeping, progress)
                asked += len(window.items)
            progress.total = asked  # a corpus may end before as much as was asked for
            progress.refresh()
        return keeping.results(then)

    def _window(self, window: Window, keeping: Keeping, progress: tqdm) -> None:
        todo = {index for index, name in enumerate(window.names) if name not in keeping.finished}
        for index in sorted(todo):
            self.model.check(window.items[index])
        progress.update(len(window.items) - len(todo))
        for batch in self._batches(window.items, [index for index in window.order if index in todo]):
            began = time.perf_counter()
            answers = self.model.answer([window.items[index] for index in batch])
            seconds = time.perf_counter() - began
            self.model_seconds[keeping.task] = self.model_seconds.get(keeping.task, 0.0) + seconds
            keeping.add(window, batch, answers, seconds / len(batch))
            progress.update(len(batch))
        keeping.close(window)

    def _batches(self, items: Sequence[Item], todo: Sequence[int]) -> Iterator[list[int]]:
        """Indices of items of one kind and about one length, as many as the model takes."""
        batch: list[int] = []
        widest = 0
        for index in todo:
            item = items[index]
            widest = max(widest, item.size)
            full = len(batch) >= self.model.rows(item.kind)
            full = full or widest * (len(batch) + 1) > self.model.batch_tokens
            if batch and (full or items[batch[0]].kind != item.kind):
                yield batch
                batch, widest = [], item.size
            batch.append(index)
        if batch:
            yield batch
