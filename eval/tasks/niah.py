"""Needle in a haystack: our own in generated text, and RULER's tasks (2404.06654) as lm-eval defines them."""

import random
from collections.abc import Iterator
from typing import Any

from .. import ruler
from ..items import GENERATE, Item, encode
from ..registry import Family, register
from ..settings import Settings
from ..text import ADJECTIVES, OBJECTS, fit, number, pick, sentence, spread, with_needles

TASK = (
    "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you \
about the number afterwards."
)
GENERATED = {"niah_text": 1, "niah_text_multikey": 4}  # needles in the text, of which one is asked for
DEFAULT_LENGTHS = (1024, 4096, 16384, 65536)
DEFAULT_ITEMS = 20
NEW_TOKENS = 16
RULER_NEW_TOKENS = 128


def names(count: int, draw: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[f"{pick(ADJECTIVES, draw)}-{pick(OBJECTS, draw)}"] = None
    return list(found)


class Haystack:
    """One example. Its text grows with the number of sentences, and the beginning stays."""

    def __init__(self, seed: str, depth: float, needles: int) -> None:
        draw = random.Random(seed)
        self.keys = names(needles, draw)
        self.values = [number(7, draw) for _ in self.keys]
        # the one asked for lies at the depth, the others are spread over the rest of the text
        self.depths = [depth, *((depth + i / needles) % 1.0 for i in range(1, needles))]
        self._draw = draw
        self._sentences: list[str] = []

    def write(self, sentences: int) -> str:
        while len(self._sentences) < sentences:
            self._sentences.append(sentence(self._draw))
        needles = [
            (depth, f"One of the special magic numbers for {key} is: {value}.")
            for depth, key, value in zip(self.depths, self.keys, self.values)
        ]
        key = self.keys[0]
        return (
            f"{TASK}\n{with_needles(self._sentences[:sentences], needles)}\n"
            f"What is the special magic number for {key} mentioned in the provided text? "
            f"The special magic number for {key} mentioned in the provided text is"
        )


def build(task: str, settings: Settings, tokenizer: Any) -> Iterator[Item]:
    lengths = settings.lengths_or(*DEFAULT_LENGTHS)
    count = settings.limit or DEFAULT_ITEMS
    if task not in GENERATED:
        yield from build_ruler(task, settings, tokenizer, lengths, count)
        return
    for length in lengths:
        for index, depth in enumerate(spread(settings.depths, count)):
            haystack = Haystack(f"{task}:{settings.seed}:{length}:{index}", depth, GENERATED[task])
            yield Item(
                task=task,
                key=f"length={length}/{index}",
                kind=GENERATE,
                tokens=fit(haystack.write, tokenizer, length - NEW_TOKENS),
                answers=(haystack.values[0],),
                rule="first_number",
                max_new_tokens=NEW_TOKENS,
                stop=("\n",),
                budget=length,
                group={"length": length, "depth": depth},
            )


def build_ruler(
    task: str, settings: Settings, tokenizer: Any, lengths: tuple[int, ...], count: int
) -> Iterator[Item]:
    for length in lengths:
        for document in ruler.documents(task, length, count, settings.seed, tokenizer, settings.data):
            prompt = f"{document['input']} {document['gen_prefix']}"
            where = prompt.index(document["outputs"][0]) / len(prompt)
            yield Item(
                task=task,
                key=f"length={length}/{document['index']}",
                kind=GENERATE,
                tokens=encode(tokenizer, prompt),
                answers=tuple(document["outputs"]),
                rule="contains_all",
                max_new_tokens=RULER_NEW_TOKENS,
                budget=length,
                group={"length": length, "depth": round(where * 4) / 4},
            )


def lacks(task: str, settings: Settings) -> str | None:
    return None if task in GENERATED else ruler.lacks(task, settings.data)


def count(task: str, settings: Settings) -> int:
    return len(settings.lengths_or(*DEFAULT_LENGTHS)) * (settings.limit or DEFAULT_ITEMS)


register(Family(name="niah", tasks=(*GENERATED, *ruler.TASKS), build=build, lacks=lacks, count=count))
