"""In-context learning: few-shot classification. The label has to be the first line of the continuation.

`icl_topics` is generated: which made-up word names which topic changes from item to item, so that only the
examples in the prompt can tell. The others are public data sets with their own labels.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..datafiles import DOWNLOAD, read_rows
from ..items import GENERATE, Item, encode
from ..registry import Family, register
from ..settings import Settings
from ..text import pick

SOURCES = {
    "icl_sst2": "sst2",
    "icl_ag_news": "ag_news",
    "icl_trec": "TREC-QC",
    "icl_subj": "subj",
    "icl_banking77": "banking77",
}
FIELDS = ("text", "label_text")
GENERATED = "icl_topics"
LABELS = ("red", "blue", "green", "gold", "black", "white")
TOPICS = {
    "music": "violin drum choir song melody trumpet concert piano",
    "sea": "wave anchor sailor harbour shell tide fish lighthouse",
    "kitchen": "soup oven bread spoon kettle onion butter plate",
    "winter": "snow ice frost sled glove blizzard icicle scarf",
}
FRAMES = (
    "Everyone talked about the {a} and the {b}.",
    "She dreamed of a {a} next to a {b}.",
    "There was a {a} behind the {b}.",
    "He wrote a story about the {a} and a {b}.",
)
DEFAULT_ITEMS = 200
NEW_TOKENS = 16


def write(examples: Sequence[tuple[str, str]], question: str) -> str:
    shown = "".join(f"Input: {text}\nLabel: {label}\n\n" for text, label in examples)
    return f"{shown}Input: {question}\nLabel:"


def topic_examples(count: int, draw: random.Random) -> list[tuple[str, str]]:
    """`count` sentences with labels, each topic as often as the others; the labels are this draw's own."""
    labels = sorted(LABELS, key=lambda _: draw.random())
    topics = [list(TOPICS)[i % len(TOPICS)] for i in range(count)]
    examples = []
    for topic in sorted(topics, key=lambda _: draw.random()):
        first, second = sorted(TOPICS[topic].split(), key=lambda _: draw.random())[:2]
        sentence = pick(FRAMES, draw).format(a=first, b=second)
        examples.append((sentence, labels[list(TOPICS).index(topic)]))
    return examples


def by_label(rows: Sequence[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for row in rows:
        groups.setdefault(row[1], []).append(row)
    return groups


def balanced(
    groups: dict[str, list[tuple[str, str]]], count: int, draw: random.Random
) -> list[tuple[str, str]]:
    """`count` examples, none twice, in which the labels are as even as the count allows.

    The time it takes depends on `count` alone: it is called for every item, and data sets have 100,000 rows.

    Raises:
        ValueError: there are not so many.
    """
    labels = sorted(groups, key=lambda _: draw.random())
    quota = dict.fromkeys(labels, 0)
    while (open_places := count - sum(quota.values())) > 0:
        unused = [label for label in labels if quota[label] < len(groups[label])]
        if not unused:
            raise ValueError(f"shots={count}: there are only {sum(quota.values())} examples to show")
        for label in unused[:open_places]:
            quota[label] += 1
    chosen = [
        groups[label][at] for label in labels for at in distinct(len(groups[label]), quota[label], draw)
    ]
    return sorted(chosen, key=lambda _: draw.random())


def distinct(size: int, count: int, draw: random.Random) -> list[int]:
    """`count` different numbers below `size`: the first steps of a Fisher-Yates shuffle, on what it moves."""
    moved: dict[int, int] = {}
    found = []
    for first in range(count):
        at = first + int(draw.random() * (size - first))
        found.append(moved.get(at, at))
        moved[at] = moved.get(first, first)
    return found


def build(task: str, settings: Settings, tokenizer: Any) -> Iterator[Item]:
    count = settings.limit or DEFAULT_ITEMS
    if task == GENERATED:
        for shots in settings.shots:
            for index in range(count):
                draw = random.Random(f"{task}:{settings.seed}:{shots}:{index}")
                *examples, (question, label) = topic_examples(shots + 1, draw)
                yield make_item(task, shots, index, examples, question, label, tokenizer)
        return
    folder = settings.data / SOURCES[task]
    train, test = (list(_rows(folder, split)) for split in ("train", "test"))
    groups = by_label(train)
    # a label of more tokens than may be written could never be right
    longest = max(len(encode(tokenizer, f" {label}", special=False)) for label in groups)
    new_tokens = max(NEW_TOKENS, longest + 4)
    order = random.Random(f"{task}:{settings.seed}:test")
    test = sorted(test, key=lambda _: order.random())[:count]
    for shots in settings.shots:
        for index, (question, label) in enumerate(test):
            draw = random.Random(f"{task}:{settings.seed}:{shots}:{index}")
            examples = balanced(groups, shots, draw)
            yield make_item(task, shots, index, examples, question, label, tokenizer, new_tokens)


def _rows(folder: Path, split: str) -> Iterator[tuple[str, str]]:
    for number, row in enumerate(read_rows(folder, split, FIELDS)):
        label = row["label_text"].strip()
        if not label:  # silence would be right
            raise ValueError(f"{folder} row {number} of {split} has an empty label")
        yield " ".join(row["text"].split()), label


def make_item(
    task: str,
    shots: int,
    index: int,
    examples: Sequence[tuple[str, str]],
    question: str,
    label: str,
    tokenizer: Any,
    new_tokens: int = NEW_TOKENS,
) -> Item:
    return Item(
        task=task,
        key=f"shots={shots}/{index}",
        kind=GENERATE,
        tokens=encode(tokenizer, write(examples, question)),
        answers=(label,),
        rule="first_line",
        max_new_tokens=new_tokens,
        stop=("\n",),
        group={"shots": shots},
    )


def lacks(task: str, settings: Settings) -> str | None:
    if task == GENERATED or (settings.data / SOURCES[task]).is_dir():
        return None
    return f"no data in {settings.data / SOURCES[task]}: {DOWNLOAD}"


def count(task: str, settings: Settings) -> int:
    asked = settings.limit or DEFAULT_ITEMS
    if task != GENERATED:
        rows = _rows(settings.data / SOURCES[task], "test")
        asked = sum(1 for _ in itertools.islice(rows, asked))
    return len(settings.shots) * asked


register(Family(name="icl", tasks=(GENERATED, *SOURCES), build=build, lacks=lacks, count=count))
