"""Common sense: PIQA, HellaSwag, WinoGrande, ARC and SIQA through lm-eval; and its other tasks by name."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

from .. import harness, harness_loading
from ..datafiles import DOWNLOAD, Problem, problem_of
from ..questions import Questions
from ..registry import HARNESS_PREFIX, Family, register
from ..settings import Settings

Row = dict[str, Any]


# ----------------------------------------------------------------------------------------------------
# what a row must hold: lm-eval asks about "None" where a field is missing, and no label is a wrong answer


def _texts(row: Row, fields: tuple[str, ...], lists: tuple[str, ...] = ()) -> str | None:
    if problem := problem_of(row, (*fields, *lists), lists):
        return problem
    empty = [field for field in fields if not row[field].strip()]
    empty += [field for field in lists if not all(text.strip() for text in row[field] or [""])]
    return f"nothing stands in field {empty[0]}" if empty else None


def _label(
    row: Row, field: str, options: Collection[Any], read: Callable[[Any], Any] = lambda label: label
) -> str | None:
    if row.get(field) is None:
        return problem_of(row, (field,))
    if read(row[field]) in options:
        return None
    return f"field {field} is none of {', '.join(map(repr, options))} but {repr(row[field])[:60]}"


def _number(label: Any) -> str:
    """Where lm-eval reads a number out of a label, be it a text or not."""
    return str(label).strip()


def piqa(row: Row) -> str | None:
    return _texts(row, ("goal", "sol1", "sol2")) or _label(row, "label", (0, 1))


def hellaswag(row: Row) -> str | None:
    problem = problem_of(row, ("ctx_b",))  # empty in most of them
    problem = problem or _texts(row, ("activity_label", "ctx_a"), ("endings",))
    return problem or _label(row, "label", [str(place) for place in range(len(row["endings"]))], _number)


def winogrande(row: Row) -> str | None:
    problem = _texts(row, ("sentence", "option1", "option2"))
    if not problem and "_" not in row["sentence"]:
        return f"field sentence has no gap '_': {row['sentence'][:60]!r}"
    return problem or _label(row, "answer", ("1", "2"))


def arc(row: Row) -> str | None:
    problem = _texts(row, ("question",))
    if problem or row.get("choices") is None:
        return problem or problem_of(row, ("choices",))
    choices = row["choices"]
    if not isinstance(choices, dict):
        return f"field choices has no text and label but is {str(choices)[:60]!r}"
    if problem := _texts(choices, (), ("text", "label")):
        return f"in choices: {problem}"
    if len(choices["text"]) != len(choices["label"]):
        return f"choices are {len(choices['text'])} texts and {len(choices['label'])} labels"
    return _label(row, "answerKey", choices["label"])


def siqa(row: Row) -> str | None:
    problem = _texts(row, ("context", "question", "answerA", "answerB", "answerC"))
    return problem or _label(row, "label", ("1", "2", "3"), _number)


def cloze(row: Row) -> str | None:
    return problem_of(row, ("text", "value"))


def anything(row: Row) -> None:
    return None


# ----------------------------------------------------------------------------------------------------
# tasks


class Source(NamedTuple):
    name: str  # lm-eval's
    home: str | None = None  # its folder in lm-eval
    folder: str | None = None  # of its data; None: lm-eval fetches it
    problem: Problem = anything  # of a row


TASKS = {
    "piqa": Source("piqa", "piqa", "piqa", piqa),
    "hellaswag": Source("hellaswag", "hellaswag", "hellaswag", hellaswag),
    "winogrande": Source("winogrande", "winogrande", "winogrande", winogrande),
    "arc_easy": Source("arc_easy", "arc", "ai2_arc", arc),
    "arc_challenge": Source("arc_challenge", "arc", "ai2_arc", arc),
    "siqa": Source("social_iqa", "siqa", "siqa", siqa),
}
# asked for by lm-eval's names, and of data that is downloaded for `recall`
UNCUT = {
    f"{HARNESS_PREFIX}swde": Source("swde", "swde", "based-swde-v2", cloze),
    f"{HARNESS_PREFIX}fda": Source("fda", "fda", "based-fda", cloze),
    f"{HARNESS_PREFIX}squad_completion": Source("squad_completion", "squad_completion", "based-squad", cloze),
}


def source_of(task: str) -> Source:
    return TASKS.get(task) or UNCUT.get(task) or Source(task.removeprefix(HARNESS_PREFIX))


def _folder(task: str, settings: Settings) -> Path | None:
    folder = source_of(task).folder
    return None if folder is None else settings.data / folder


def prepare(task: str, settings: Settings, tokenizer: Any) -> Questions:
    name, home, _, problem = source_of(task)
    folder = _folder(task, settings)
    return harness.questions(name, task, home, folder, problem, settings.limit, tokenizer)


def lacks(task: str, settings: Settings) -> str | None:
    if not harness_loading.installed():
        return f"lm-eval is not installed: {harness_loading.INSTALL}"
    folder = _folder(task, settings)
    if folder is not None and not folder.is_dir():
        return f"no data in {folder}: {DOWNLOAD}"
    try:
        harness_loading.import_lm_eval()
    except ImportError as error:  # something that it needs is missing or does not fit
        return f"lm-eval cannot be imported ({error}): {harness_loading.INSTALL}"
    return None


def check(settings: Settings) -> None:
    for task in settings.tasks:
        if task.startswith(HARNESS_PREFIX) and harness_loading.installed():
            source = source_of(task)
            harness_loading.check_name(source.name, source.home)


register(Family(name="commonsense", tasks=tuple(TASKS), prepare=prepare, lacks=lacks, check=check))
