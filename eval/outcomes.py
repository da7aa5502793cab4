"""All tasks with one model: summaries of those that ran, reasons of those that did not, and their time."""

import contextlib
import functools
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from .ahead import Ahead
from .registry import Family
from .session import Session
from .store import Record
from .summary import summarise


class Outcomes:
    """What became of each task.

    Attributes:
        done: summaries.
        failed: reasons.
        seconds: how long each was waited for; what is done for it while others are answered costs nothing.
    """

    def __init__(self) -> None:
        self.done: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def of(self, task: str) -> Iterator[None]:
        """Time and errors of what is done inside are the task's; the others go on."""
        began = time.perf_counter()
        try:
            yield
        except (ValueError, MemoryError, OSError) as error:
            self._fail(task, " ".join(str(error).split()))
        except Exception as error:
            # nobody foresaw it: shown in full, and still no reason to lose the other tasks' report
            traceback.print_exc()
            self._fail(task, f"{type(error).__name__}: {' '.join(str(error).split())}")
        finally:
            self.seconds[task] = self.seconds.get(task, 0.0) + time.perf_counter() - began

    def _fail(self, task: str, reason: str) -> None:
        self.failed[task] = reason
        print(f"failed {task}: {reason}", file=sys.stderr)


def answer_all(tasks: Sequence[tuple[Family, str]], session: Session, ahead: Ahead) -> Outcomes:
    """Each task of `ahead` in turn; the last scores and the summary of one are made during the next."""
    outcomes = Outcomes()
    summaries: dict[str, Future] = {}
    for family, task in tasks:
        with outcomes.of(task):
            summaries[task] = session.answer(task, ahead, functools.partial(_summary, family.name, task))
    for task, summary in summaries.items():
        with outcomes.of(task):
            outcomes.done[task] = summary.result()
    for task, found in outcomes.done.items():
        inside, seconds = session.model_seconds.get(task, 0.0), outcomes.seconds[task]
        found.update(seconds=seconds, model_seconds=inside, outside_share=outside_share(inside, seconds))
    return outcomes


def _summary(family: str, task: str, records: Sequence[Record]) -> dict[str, Any]:
    if not records:
        raise ValueError("there are no items")
    return summarise(family, task, records)


def outside_share(inside: float, seconds: float) -> float | None:
    """Of the time in which the model did not answer; None where it was asked nothing, as all was kept."""
    return 1 - inside / seconds if inside else None
