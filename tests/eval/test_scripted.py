"""Always right scores 1.0 on every task, silence 0.0, and rambling what the rule says."""

from collections.abc import Callable
from typing import Any

import pytest

from eval import ruler
from eval.registry import load_families, select
from eval.scripted import SCRIPTED
from eval.settings import Settings

SMALL = {"limit": 3, "lengths": "1024,2048", "pairs": "4,16", "shots": "2,6"}
EVERY_TASK = [
    (family.name, task) for family in load_families().values() for task in family.tasks + family.extra
]
# a first line of chat around the answer: right where the rule is "contains", wrong where it is "equals"
RAMBLING = {
    "recall": 1.0,
    "recall_twice": 1.0,
    "niah": 1.0,
    "passkey": 1.0,
    "icl": 0.0,
    "mqar": 0.0,
    "ppl": 0.0,
}


@pytest.fixture(autouse=True)
def sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    """nltk's sentence splitter needs a download; for the essays of these tests full stops will do."""
    ruler._generator()
    monkeypatch.setattr("nltk.data.find", lambda name: name)
    monkeypatch.setattr(
        "lm_eval.tasks.ruler.prepare_niah.sent_tokenize",
        lambda text: [f"{part}." for part in text.split(". ")],
    )


def score(name: str, task: str, settings: Settings, make: Callable[[Any], Any], tokenizer: Any) -> float:
    ((family, _),) = select([task])
    assert family.lacks(task, settings) is None
    records = make(SCRIPTED[name](tokenizer)).ask(task, lambda: family.questions(task, settings, tokenizer))
    assert records
    return sum(record["score"] for record in records) / len(records)


@pytest.mark.parametrize(("family", "task"), EVERY_TASK)
def test_oracle_is_right_and_silence_is_wrong(
    family: str, task: str, settings: Callable[..., Settings], session: Callable, tokenizer: Any
) -> None:
    chosen = settings(tasks=task, **SMALL)
    assert score("oracle", task, chosen, lambda model: session(model, "oracle"), tokenizer) == 1.0
    assert score("silent", task, chosen, lambda model: session(model, "silent"), tokenizer) == 0.0


@pytest.mark.parametrize(("family", "task"), [entry for entry in EVERY_TASK if entry[0] in RAMBLING])
def test_rambling_gets_what_the_rule_says(
    family: str, task: str, settings: Callable[..., Settings], session: Callable, tokenizer: Any
) -> None:
    chosen = settings(tasks=task, **SMALL)
    assert score("rambling", task, chosen, session, tokenizer) == RAMBLING[family]
