"""Runs items through one model: what is already answered is skipped, the rest is batched, answered, kept."""

import queue
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from tqdm import tqdm

from .items import LOGLIKELIHOOD, Item
from .scoring import RULES
from .store import Record, Store

T = TypeVar("T")
WINDOW_ITEMS = 1024  # items sorted by length together; more pad less and hold more memory
WINDOW_TOKENS = 2**18
FIRST_ITEMS = 32  # the model waits while the first window is made; from then on they grow twofold
FIRST_TOKENS = 2**16


class Session:
    """One model, its kept answers, and the time spent inside and outside of it.

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

    def run(
        self,
        task: str,
        items: Iterable[Item],
        total: int | None = None,
        records: list[Record] | None = None,
    ) -> list[Record]:
        """The records of all items, in their order.

        Args:
            records: the list to fill, for those who watch it meanwhile.

        Raises:
            ValueError: an item that is longer than its budget, the tokenizer or the model allows.
            MemoryError: an item that does not fit the memory.
        """
        began = time.perf_counter()
        finished = self.store.finished(task)
        records = [] if records is None else records
        with tqdm(total=total, desc=task, unit="item", disable=self.quiet) as progress:
            for window, names in _ahead(self._named(items)):
                records += self._window(task, window, names, finished, progress)
            progress.total = len(records)  # a corpus may end before as much as was asked for
            progress.refresh()
        self.seconds[task] = self.seconds.get(task, 0.0) + time.perf_counter() - began
        return records

    def _named(self, items: Iterable[Item]) -> Iterator[tuple[list[Item], list[str]]]:
        for window in _windows(items):
            yield window, [item.fingerprint(self.identity) for item in window]

    def _window(
        self,
        task: str,
        window: list[Item],
        names: list[str],
        finished: dict[str, Record],
        progress: tqdm,
    ) -> list[Record]:
        todo = [index for index, name in enumerate(names) if name not in finished]
        for index in todo:
            self.model.check(window[index])
        progress.update(len(window) - len(todo))
        for batch in self._batches(window, todo):
            began = time.perf_counter()
            answers = self.model.answer([window[index] for index in batch])
            seconds = time.perf_counter() - began
            self.model_seconds[task] = self.model_seconds.get(task, 0.0) + seconds
            new = [
                _record(window[index], names[index], answer, seconds / len(batch))
                for index, answer in zip(batch, answers, strict=True)
            ]
            self.store.add(task, new)
            finished.update({record["fingerprint"]: record for record in new})
            progress.update(len(batch))
        return [finished[name] for name in names]

    def _batches(self, items: Sequence[Item], todo: Sequence[int]) -> Iterator[list[int]]:
        """Indices of items of one kind and about one length; the longest first, to fail early.

        Options of one question stay together: a batch reads their context once.
        """

        def place(index: int) -> tuple[str, int, int]:
            item = items[index]
            return item.kind, item.continuation - item.size, -item.size

        batch: list[int] = []
        widest = 0
        for index in sorted(todo, key=place):
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


def _record(item: Item, name: str, answer: Any, seconds: float) -> Record:
    score = RULES[item.rule](answer, item)
    return {
        "fingerprint": name,
        "task": item.task,
        "key": item.key,
        "group": item.group,
        "score": None if score != score else score,
        "answer": list(answer) if item.kind == LOGLIKELIHOOD else answer,
        "expected": list(item.answers),
        "prompt_tokens": len(item.tokens),
        "seconds": round(seconds, 4),
    }


def _windows(items: Iterable[Item]) -> Iterator[list[Item]]:
    window: list[Item] = []
    tokens, most_items, most_tokens = 0, FIRST_ITEMS, FIRST_TOKENS
    for item in items:
        window.append(item)
        tokens += item.size
        if len(window) >= most_items or tokens >= most_tokens:
            yield window
            window, tokens = [], 0
            most_items, most_tokens = min(2 * most_items, WINDOW_ITEMS), min(2 * most_tokens, WINDOW_TOKENS)
    if window:
        yield window


def _ahead(items: Iterable[T], depth: int = 1) -> Iterator[T]:
    """The same windows, made in a thread meanwhile: the GPU need not wait for prompts to be written.

    Whole windows, as a few items ahead are few milliseconds of a GPU where prompts are short.
    """
    made: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(entry: tuple[str, Any]) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        try:
            for item in items:
                if not put(("item", item)):
                    return
            put(("end", None))
        except BaseException as error:
            put(("error", error))

    threading.Thread(target=produce, daemon=True).start()
    try:
        while True:
            kind, value = made.get()
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
