"""Tasks are prepared while the model loads or answers, and answers kept while it gives the next ones."""

import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from eval import ahead as ahead_module
from eval import opening, ruler
from eval.ahead import TASKS_AHEAD, Ahead
from eval.items import Item, as_tokens
from eval.outcomes import answer_all
from eval.questions import Questions
from eval.registry import FAMILIES, Family
from eval.run import main
from eval.scripted import Oracle
from eval.session import Session

SECONDS = 20.0  # within which another thread does its part


def items_named(task: str, count: int) -> Iterator[Item]:
    for number in range(count):
        yield Item(task, str(number), "generate", as_tokens([1, 2, 3]), answers=("yes",), max_new_tokens=1)


def asks(task: str, count: int) -> Callable[[], Questions]:
    return lambda: Questions(items_named(task, count))


def keys(windows: Iterator[ahead_module.Window]) -> list[str]:
    return [item.key for window in windows for item in window.items]


def eventually(holds: Callable[[], bool]) -> bool:
    ends = time.monotonic() + SECONDS
    while not holds() and time.monotonic() < ends:
        time.sleep(0.01)
    return holds()


class Waiting(Oracle):
    """Answers when it is let."""

    def __init__(self, tokenizer: Any, may: threading.Event) -> None:
        super().__init__(tokenizer)
        self.may = may

    def answer(self, items: Any) -> list[Any]:
        assert self.may.wait(SECONDS)
        return super().answer(items)


def test_a_task_is_prepared_while_the_model_answers_the_one_before(session: Callable, tokenizer: Any) -> None:
    begun = threading.Event()

    def second() -> Iterator[Item]:
        yield from items_named("second", 2)
        begun.set()

    answering = session(Waiting(tokenizer, begun))
    with Ahead([asks("first", 2), lambda: Questions(second())], "identity") as ahead:
        first = answering.answer("first", ahead, list)
        assert [record["score"] for record in first.result()] == [1.0, 1.0]
        assert len(answering.answer("second", ahead, list).result()) == 2


def test_the_first_task_is_prepared_while_the_model_loads(tmp_path: Path, monkeypatch: Any) -> None:
    made = threading.Event()
    real = opening.open_model

    def loads(*arguments: Any) -> Any:
        assert made.wait(SECONDS)
        return real(*arguments)

    monkeypatch.setattr("eval.tasks.passkey.fit", lambda *_: made.set() or as_tokens([1, 2, 3]))
    monkeypatch.setattr("eval.opening.open_model", loads)
    command = ["model=scripted:oracle", "tasks=passkey", f"output={tmp_path}", "plots=false", "limit=1"]
    assert main([*command, "lengths=512"]) == 0


def test_few_tasks_are_begun_ahead_and_all_in_one_thread() -> None:
    threads: list[int] = []

    def note() -> Questions:
        threads.append(threading.get_ident())
        return Questions(items_named("t", 1))

    with Ahead([note] * 9, "identity") as ahead:
        for begun in range(9):
            assert eventually(lambda: len(threads) == min(begun + TASKS_AHEAD, 9))  # noqa: B023
            ahead.begin()
            assert keys(ahead.windows()) == ["0"]
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_windows_made_ahead_are_few(monkeypatch: Any) -> None:
    monkeypatch.setattr(ahead_module, "WINDOW_ITEMS", 2)
    written = itertools.count()
    items = (item for item in items_named("t", 1000) if next(written) >= 0)
    with Ahead([lambda: Questions(items)], "identity") as ahead:
        assert eventually(lambda: ahead._made.full())
        time.sleep(0.05)
        assert next(written) <= 2 * (ahead_module.WINDOWS_AHEAD + 1)


def test_what_keeps_a_task_from_being_prepared_is_its_own_error() -> None:
    def broken() -> Questions:
        raise ValueError("no rows")

    def breaks() -> Iterator[Item]:
        yield from items_named("third", 1)
        raise KeyError("goal")

    with Ahead([asks("a", 1), broken, lambda: Questions(breaks()), asks("d", 2)], "identity") as ahead:
        ahead.begin()
        assert keys(ahead.windows()) == ["0"]
        with pytest.raises(ValueError, match="no rows"):
            ahead.begin()
        ahead.begin()
        with pytest.raises(KeyError, match="goal"):
            keys(ahead.windows())
        ahead.begin()
        assert keys(ahead.windows()) == ["0", "1"]


def test_what_is_left_of_a_task_that_was_given_up_is_dropped(monkeypatch: Any) -> None:
    monkeypatch.setattr(ahead_module, "WINDOW_ITEMS", 1)
    with Ahead([lambda: Questions(items_named("endless", 10**9)), asks("next", 3)], "identity") as ahead:
        ahead.begin()
        next(ahead.windows())
        ahead.begin()
        assert keys(ahead.windows()) == ["0", "1", "2"]


def test_the_thread_ends_with_the_run() -> None:
    with Ahead([lambda: Questions(items_named("endless", 10**9)), asks("next", 3)], "identity") as ahead:
        ahead.begin()
    assert not ahead._thread.is_alive()


def test_preparing_costs_a_task_nothing_while_another_is_answered(session: Callable, tokenizer: Any) -> None:
    took = 0.4

    def slow(task: str, settings: Any, tokenizer: Any) -> Questions:
        time.sleep(took)
        return Questions(items_named(task, 1))

    class Slow(Oracle):
        def answer(self, items: Any) -> list[Any]:
            time.sleep(2 * took)
            return super().answer(items)

    family = Family("family", ("first", "second"), prepare=slow)
    tasks = [(family, task) for task in family.tasks]
    prepare = [lambda task=task: family.questions(task, None, tokenizer) for task in family.tasks]
    answering = session(Slow(tokenizer))
    with Ahead(prepare, "identity") as ahead:
        outcomes = answer_all(tasks, answering, ahead)
    first, second = outcomes.done["first"], outcomes.done["second"]
    assert first["seconds"] > 3 * took  # nothing was there yet
    assert first["outside_share"] == pytest.approx(1 - first["model_seconds"] / first["seconds"])
    assert second["seconds"] - second["model_seconds"] < took / 2


class Full:
    """The store of a disk without room."""

    def finished(self, task: str) -> dict[str, Any]:
        return {}

    def add(self, task: str, records: Any) -> None:
        raise OSError(28, "No space left on device")


def test_answers_that_cannot_be_kept_end_their_task_early(tokenizer: Any) -> None:
    answered: list[int] = []

    class Counting(Oracle):
        max_rows = 1

        def answer(self, items: Any) -> list[Any]:
            answered.append(len(items))
            time.sleep(0.005)
            return super().answer(items)

    with (
        Session(Counting(tokenizer), Full(), "identity", quiet=True) as answering,
        pytest.raises(OSError, match="No space left"),
    ):
        answering.run("t", items_named("t", 1000))
    assert len(answered) < 1000


def test_scores_that_cannot_be_had_fail_their_task_alone(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    class Unscored(Questions):
        def results(self) -> list[Any]:
            raise ValueError("no metric")

    broken = Family("broken", ("unscored",), prepare=lambda task, *_: Unscored(items_named(task, 3)))
    monkeypatch.setitem(FAMILIES, "broken", broken)
    command = ["model=scripted:oracle", f"output={tmp_path}", "plots=false", "limit=1", "lengths=512"]
    assert main([*command, "tasks=unscored,passkey"]) == 1
    assert "failed unscored: no metric" in capsys.readouterr().err
    (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
    assert model["failed"] == {"unscored": "no metric"}
    assert model["tasks"]["passkey"]["score"] == 1.0


def test_the_report_tells_the_share_of_each_task(tmp_path: Path) -> None:
    command = ["model=scripted:oracle", f"output={tmp_path}", "plots=false", "limit=1", "lengths=512"]
    assert main([*command, "tasks=passkey,mqar"]) == 0
    (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
    shown = (tmp_path / "report.md").read_text().split("## Time")[1]
    for task, found in model["tasks"].items():
        assert found["outside_share"] == pytest.approx(1 - found["model_seconds"] / found["seconds"])
        assert f"{found['seconds']:.1f} s, {100 * found['outside_share']:.1f} %" in shown
        assert f"| {task}" in shown
    assert main([*command, "tasks=passkey,mqar"]) == 0  # all is kept: the model is asked nothing
    (model,) = json.loads((tmp_path / "results.json").read_text())["models"]
    assert {found["outside_share"] for found in model["tasks"].values()} == {None}


def test_rulers_bars_are_silent_and_those_of_other_threads_are_not() -> None:
    from unittest import mock

    from tqdm import tqdm

    bars: list[Any] = []
    with mock.patch("tqdm.std.tqdm.__init__", ruler._silent_bar()):
        bars.append(tqdm(total=1))
        other = threading.Thread(target=lambda: bars.append(tqdm(total=1)))
        other.start()
        other.join()
    assert [bar.disable for bar in bars] == [True, False]
