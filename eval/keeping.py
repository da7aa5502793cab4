"""Answers are scored and kept in a thread while the model gives the next: no GPU waits for a disk."""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from .ahead import Window
from .items import LOGLIKELIHOOD, Item
from .questions import Questions
from .scoring import RULES
from .store import Record, Store

T = TypeVar("T")


class Keeping:
    """What becomes of the answers to one task.

    Args:
        pool: of one thread, so that all is done in the order in which it is asked for.

    Attributes:
        finished: the records of earlier runs and of this one, by fingerprint.
    """

    def __init__(self, task: str, questions: Questions, store: Store, pool: ThreadPoolExecutor) -> None:
        self.task = task
        self.questions = questions
        self.finished = store.finished(task)
        self._store = store
        self._pool = pool
        self._jobs: deque[Future] = deque()

    def add(self, window: Window, batch: Sequence[int], answers: Sequence[Any], seconds: float) -> None:
        """Of the model to the items `batch` of the window, `seconds` each.

        Raises:
            OSError: earlier ones could not be written.
            ValueError: earlier ones could not be scored.
        """
        self._do(self._add, window, batch, answers, seconds)

    def close(self, window: Window) -> None:
        """All of its items are answered. Raises as `add` does."""
        self._do(lambda: self.questions.take([self.finished[name] for name in window.names]))

    def results(self, then: Callable[[list[Record]], T]) -> "Future[T]":
        """What `then` makes of the task's records. The future raises as `add` does, and as `then` does."""

        def last() -> T:
            for job in self._jobs:
                job.result()
            return then(self.questions.results())

        return self._pool.submit(last)

    def _do(self, job: Callable[..., None], *arguments: Any) -> None:
        while self._jobs and self._jobs[0].done():
            self._jobs.popleft().result()
        self._jobs.append(self._pool.submit(job, *arguments))

    def _add(self, window: Window, batch: Sequence[int], answers: Sequence[Any], seconds: float) -> None:
        new = [
            _record(window.items[index], window.names[index], answer, seconds)
            for index, answer in zip(batch, answers, strict=True)
        ]
        self._store.add(self.task, new)
        self.finished.update({record["fingerprint"]: record for record in new})


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
