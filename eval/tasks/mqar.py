"""Multi-query associative recall (Zoology, 2312.04927): how many pairs does the state hold, for how long?

    start  k1 v1 k2 v2 ... kn vn  (distance tokens of filler)  k7 v7 k2 v2 ...

One forward pass answers all questions: after each repeated key the likeliest token has to be its value.
Models trained with the recall tokens (data/recall.py) are asked with them, others with words that are one
token each.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data.recall import N_KEYS, recall_example, recall_prompt, recall_vocabulary

from ..items import PREDICT, Item, as_tokens
from ..registry import Family, register
from ..settings import Settings
from ..text import pick

DEFAULT_ITEMS = 64
WORDS = 2**12  # enough pairs for every question, few enough to be common words in most vocabularies


@dataclass(frozen=True)
class Alphabet:
    keys: list[int]
    values: list[int]
    filler: list[int]
    start: int


def alphabet(tokenizer: Any) -> Alphabet:
    """Token ids to ask with; a fixed function of the tokenizer."""
    start = next((i for i in (tokenizer.eos_token_id, tokenizer.bos_token_id) if i is not None), 0)
    words = _words(tokenizer)
    try:
        keys, values = recall_vocabulary(tokenizer)
    except ValueError:
        # thirds of one alphabetical list: no token is both a key and a value
        return Alphabet(words[0::3], words[1::3], words[2::3], start)
    return Alphabet(keys, values, words, start)


def _words(tokenizer: Any) -> list[int]:
    """Whole words of three and more letters; of a vocabulary with few of them the single characters."""
    vocabulary = tokenizer.get_vocab()
    words = sorted(token for token in vocabulary if re.fullmatch("[Ġ▁][a-z]{3,}", token))
    if len(words) < 3 * N_KEYS:
        words = sorted(token for token in vocabulary if len(token) == 1)
    step = max(len(words) // WORDS, 1)
    return [vocabulary[token] for token in words[::step]]


def build(task: str, settings: Settings, tokenizer: Any) -> Iterator[Item]:
    known = alphabet(tokenizer)
    room = len(known.keys)  # of values there may be fewer: several keys may have the same one
    if max(settings.pairs) > room:
        raise ValueError(f"pairs={max(settings.pairs)}: this tokenizer has keys for {room} pairs at most")
    for pairs in settings.pairs:
        for distance in settings.distances:
            for index in range(settings.limit or DEFAULT_ITEMS):
                yield make_item(task, known, pairs, distance, index, settings.seed)


def make_item(task: str, known: Alphabet, pairs: int, distance: int, index: int, seed: int) -> Item:
    sizes = {"n_keys": len(known.keys), "n_values": len(known.values)}
    example = recall_example(seed, index, pairs, **sizes)
    ids, positions, expected = recall_prompt(example, known.keys, known.values, known.start)
    draw = random.Random(f"mqar:{seed}:{pairs}:{distance}:{index}")
    middle = 1 + 2 * pairs
    filler = [pick(known.filler, draw) for _ in range(distance)]
    return Item(
        task=task,
        key=f"pairs={pairs}/distance={distance}/{index}",
        kind=PREDICT,
        tokens=as_tokens(ids[:middle] + filler + ids[middle:]),
        answers=tuple(expected),
        rule="predictions",
        positions=tuple(position + distance for position in positions),
        group={"pairs": pairs, "distance": distance},
    )


def count(task: str, settings: Settings) -> int:
    return len(settings.pairs) * len(settings.distances) * (settings.limit or DEFAULT_ITEMS)


register(Family(name="mqar", tasks=("mqar",), build=build, count=count))
assert N_KEYS >= 64  # the default `pairs`
