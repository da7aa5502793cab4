"""Families of tasks: each is one file of eval/tasks that ends with `register(Family(...))`."""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .items import Item
from .questions import Questions
from .settings import Settings

HARNESS_PREFIX = "lm_eval:"


def nothing_missing(task: str, settings: Settings) -> str | None:
    return None


def unknown_count(task: str, settings: Settings) -> int | None:
    return None


def no_check(settings: Settings) -> None:
    return None


@dataclass(frozen=True)
class Family:
    """Tasks that share data and a protocol.

    Attributes:
        tasks: their names, each unique among all families; those in `extra` run only when they are named.
        build: (task, settings, tokenizer) -> items; the same on every machine.
        prepare: instead of build, where a library scores by itself: (task, settings, tokenizer) -> questions.
        lacks: (task, settings) -> what is missing and the command that brings it, or None.
        check: raises ValueError for settings that the family cannot work with.
        count: (task, settings) -> how many items `build` makes at most, without a tokenizer; None: not known.
    """

    name: str
    tasks: tuple[str, ...]
    build: Callable[[str, Settings, Any], Iterator[Item]] | None = None
    prepare: Callable[[str, Settings, Any], Questions] | None = None
    extra: tuple[str, ...] = ()
    lacks: Callable[[str, Settings], str | None] = nothing_missing
    check: Callable[[Settings], None] = no_check
    count: Callable[[str, Settings], int | None] = unknown_count

    def questions(self, task: str, settings: Settings, tokenizer: Any) -> Questions:
        """What a task asks: data is read here, and prompts are written while its items are iterated over."""
        if self.prepare is not None:
            return self.prepare(task, settings, tokenizer)
        assert self.build is not None
        return Questions(self.build(task, settings, tokenizer), self.count(task, settings))


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    FAMILIES[family.name] = family


def load_families() -> dict[str, Family]:
    from . import tasks

    for module in sorted(found.name for found in pkgutil.iter_modules(tasks.__path__)):
        importlib.import_module(f"{tasks.__name__}.{module}")
    return FAMILIES


def select(names: Iterable[str]) -> list[tuple[Family, str]]:
    """(family, task) of each chosen name, in order, without repetition.

    Raises:
        ValueError: an unknown name; the nearest ones are shown.
    """
    families = load_families()
    chosen: dict[str, Family] = {}
    for name in names:
        if name == "all":
            chosen.update({task: family for family in families.values() for task in family.tasks})
        elif name in families:
            family = families[name]
            chosen.update(dict.fromkeys(family.tasks or family.extra, family))
        else:
            chosen[name] = _family_of_task(name)
    return [(family, task) for task, family in chosen.items()]


def _family_of_task(name: str) -> Family:
    if name.startswith(HARNESS_PREFIX) and len(name) > len(HARNESS_PREFIX):
        return FAMILIES["commonsense"]
    known: list[str] = []
    for family in FAMILIES.values():
        if name in family.tasks + family.extra:
            return family
        known += [family.name, *family.tasks, *family.extra]
    near = difflib.get_close_matches(name, dict.fromkeys(known), n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"the families are {', '.join(FAMILIES)}"
    raise ValueError(f"unknown task {name!r}; {hint}")
