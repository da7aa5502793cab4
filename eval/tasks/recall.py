"""Recall of facts from a document: six data sets under the "Just read twice" protocol (2407.05483).

Zero-shot cloze: a document, then the beginning of a statement that a phrase of the document completes. The
document is cut to `length - 50` tokens around the first occurrence of the answer. Greedy, up to 48 tokens or
a line break; right when an accepted answer occurs in the continuation. The `_twice` variants give the
question, the document, the document again, and the cloze. Rows without a document or with an answer of fewer
than two letters are left out, as in the published code: nearly every continuation contains a "2".
"""

import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from ..datafiles import DOWNLOAD, read_rows
from ..items import GENERATE, Item, encode
from ..registry import Family, register
from ..settings import Settings

NEW_TOKENS = 48
ANSWER_LENGTH = 50
UNUSABLE = "which have no document or an answer of fewer than two letters"
SUMMARY = "Summary of information above..."


@dataclass(frozen=True)
class Question:
    document: str
    cue: str  # what the answer completes
    intro: str  # the question as the `_twice` variants ask it in front
    answers: tuple[str, ...]


def _without_end(text: str, end: str) -> str:
    text = text.strip()
    while end and text.lower().endswith(end.lower()):
        text = text[: -len(end)].strip()
    return text


def attribute(row: dict[str, Any]) -> Question:
    """SWDE and FDA: "... Directed by:"."""
    key = row["key"].strip()
    document = _without_end(row["text"].split(SUMMARY)[0], f"{key}:")
    name = key[:1].upper() + key[1:]
    return Question(document, f"{name}:", f"Information about {name}.", (row["value"].strip(),))


def completion(row: dict[str, Any]) -> Question:
    """SQuAD completion: the text ends with a statement that the answer completes."""
    document, text = row["context"].split("Question:")[0].strip(), row["text"].strip()
    if document in text:
        cue = text[text.rindex(document) + len(document) :]
    else:
        document, _, cue = text.rpartition("\n") if "\n" in text else text.rpartition(". ")
    return Question(document, cue.lstrip(" .\n").rstrip(), row["question"].strip(), (row["value"].strip(),))


def passage(row: dict[str, Any]) -> Question:
    """TriviaQA, DROP and NQ: context and cloze in fields of their own."""
    cue = row["question"].strip()
    context = _without_end(re.sub(r"\[(PAR|DOC|TLE)\]", "", row["context"]), cue)
    answers = tuple(answer.strip() for answer in row["answers"] if answer.strip())
    return Question(context, cue, row["orig_question"].strip(": "), answers)


@dataclass(frozen=True)
class Source:
    """`folder` is the last part of the data set's name; {length} is filled in."""

    folder: str
    fields: tuple[str, ...]
    read: Callable[[dict[str, Any]], Question]


_ATTRIBUTE = ("text", "key", "value")
_PASSAGE = ("context", "question", "orig_question", "answers")
SOURCES = {
    "swde": Source("based-swde-v2", _ATTRIBUTE, attribute),
    "fda": Source("based-fda", _ATTRIBUTE, attribute),
    "squad": Source("based-squad", ("text", "context", "question", "value"), completion),
    "triviaqa": Source("based_triviaqa", _PASSAGE, passage),
    "drop": Source("based_drop", _PASSAGE, passage),
    "nq": Source("based_nq_{length}", _PASSAGE, passage),
}
TWICE = "_twice"


def find_answer(document: str, answers: tuple[str, ...]) -> tuple[int, int] | None:
    """Start and end of what the window is centred on: the first listed answer that the document has.

    Words of their own come before parts of words: the answer 10 is not the beginning of 1034 or of 10,500.
    """
    texts = [r"\s+".join(map(re.escape, answer.split())) for answer in answers]
    for before, after in ((r"(?<!\w)(?<!\d[.,])", r"(?!\w|[.,]\d)"), ("", "")):
        for text in texts:
            # no `lower()`: it makes some letters two, and every position after them another one's
            if found := re.search(before + text + after, document, re.IGNORECASE):
                return found.span()
    return None


def cut_around(document: str, at: tuple[int, int] | None, tokenizer: Any, window: int) -> str:
    """`window` tokens of the document with the characters [start, end) of `at` in the middle.

    A document without the answer keeps its beginning. At the ends of the document the window moves, not
    shrinks.
    """
    encoded = tokenizer(document, add_special_tokens=False, truncation=False, verbose=False)
    length = len(encoded["input_ids"])
    if length <= window:
        return document
    tokens = [encoded.char_to_token(character) for character in range(*(at or (0, 0)))]
    inside = [token for token in tokens if token is not None] or [0]
    middle = (inside[0] + inside[-1] + 1) // 2
    first = min(max(middle - window // 2, 0), length - window)
    start, end = encoded.token_to_chars(first).start, encoded.token_to_chars(first + window - 1).end
    return document[start:end]


def prompt(question: Question, document: str, twice: bool) -> str:
    once = document.strip().strip(".").strip() + "."
    if twice:
        return f"{question.intro} {once}\n{once} {question.cue}"
    return f"{once} {question.cue}"


def build(task: str, settings: Settings, tokenizer: Any) -> Iterator[Item]:
    for length in settings.recall_lengths:
        asked, index = 0, -1
        for index, question in enumerate(_questions(task, settings, length)):
            if asked == settings.limit:
                break
            if usable(question):
                asked += 1
                yield make_item(task, question, length, index, tokenizer)
        else:
            left_out = f"{index + 1 - asked} of {index + 1} rows left out"
            if asked <= index:
                # not through the bar of the task that is answered meanwhile
                tqdm.write(f"{task} at {length} tokens: {left_out}, {UNUSABLE}", file=sys.stderr)


def count(task: str, settings: Settings) -> int:
    """Rows are read for it, which takes a small part of the time that it takes to cut and tokenise them."""
    total = 0
    for length in settings.recall_lengths:
        found = filter(usable, _questions(task, settings, length))
        total += sum(1 for _ in itertools.islice(found, settings.limit))
    return total


def _questions(task: str, settings: Settings, length: int) -> Iterator[Question]:
    source = SOURCES[task.removesuffix(TWICE)]
    folder = settings.data / source.folder.format(length=length)
    return map(source.read, read_rows(folder, "validation", source.fields, ("answers",)))


def usable(question: Question) -> bool:
    return bool(question.document) and bool(question.answers) and len(question.answers[0]) > 1


def make_item(task: str, question: Question, length: int, index: int, tokenizer: Any) -> Item:
    at = find_answer(question.document, question.answers)
    document = cut_around(question.document, at, tokenizer, length - ANSWER_LENGTH)
    return Item(
        task=task,
        key=f"length={length}/{index}",
        kind=GENERATE,
        tokens=encode(tokenizer, prompt(question, document, task.endswith(TWICE))),
        answers=question.answers,
        rule="contains",
        max_new_tokens=NEW_TOKENS,
        stop=("\n",),
        group={"length": length, "answer_in_document": at is not None},
    )


def lacks(task: str, settings: Settings) -> str | None:
    source = SOURCES[task.removesuffix(TWICE)]
    folders = {settings.data / source.folder.format(length=length) for length in settings.recall_lengths}
    absent = sorted(str(folder) for folder in folders if not folder.is_dir())
    return f"no data in {', '.join(absent)}: {DOWNLOAD}" if absent else None


register(Family(name="recall", tasks=tuple(SOURCES), build=build, lacks=lacks, count=count))
_twice = tuple(name + TWICE for name in SOURCES)
register(Family(name="recall_twice", tasks=(), extra=_twice, build=build, lacks=lacks, count=count))
