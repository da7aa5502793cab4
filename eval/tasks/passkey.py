"""Passkey retrieval: a number in filler text, at several depths (Mohtashami & Jaggi, 2305.16300)."""

import random
from collections.abc import Iterator
from typing import Any

from ..items import GENERATE, Item
from ..registry import Family, register
from ..settings import Settings
from ..text import fit, number, spread, with_needles

TASK = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz \
you about the important information there."
)
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the pass key? The pass key is"
DEFAULT_LENGTHS = (1024, 4096, 16384, 65536)
DEFAULT_ITEMS = 20
NEW_TOKENS = 12


def write(units: int, key: str, depth: float) -> str:
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."
    return f"{TASK}\n{with_needles([FILLER] * units, [(depth, needle)])}\n{QUESTION}"


def build(task: str, settings: Settings, tokenizer: Any) -> Iterator[Item]:
    for length in settings.lengths_or(*DEFAULT_LENGTHS):
        depths = spread(settings.depths, settings.limit or DEFAULT_ITEMS)
        for index, depth in enumerate(depths):
            key = number(5, random.Random(f"passkey:{settings.seed}:{length}:{index}"))
            yield Item(
                task=task,
                key=f"length={length}/{index}",
                kind=GENERATE,
                tokens=fit(
                    lambda n, key=key, depth=depth: write(n, key, depth), tokenizer, length - NEW_TOKENS
                ),
                answers=(key,),
                rule="first_number",
                max_new_tokens=NEW_TOKENS,
                stop=("\n",),
                budget=length,
                group={"length": length, "depth": depth},
            )


def count(task: str, settings: Settings) -> int:
    return len(settings.lengths_or(*DEFAULT_LENGTHS)) * (settings.limit or DEFAULT_ITEMS)


register(Family(name="passkey", tasks=("passkey",), build=build, count=count))
