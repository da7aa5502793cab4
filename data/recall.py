"""Associative recall: pairs of a key and a value, then keys again, drawn at random, each to be answered.

    <|key_3|><|val_9|><|key_7|><|val_1|> ... <|key_7|><|val_1|><|key_3|><|val_9|><|key_7|><|val_1|>

Multi-query associative recall (MQAR) of Zoology, arXiv 2312.04927, section 4, without its power-law gaps: a
model answers as many pairs as its recurrent state holds. As documents of a corpus the plain language-model
loss trains it. An example is a function of (seed, index) alone, the same on every machine and Python version.

Keys are asked for with replacement. Were each asked for once, in front of the right answer to the one before,
a model that rules out the values it has just read would be right (1 + 1/2 + ... + 1/n) / n of the time, half
of the time at 4 pairs, without ever looking at a key. Here what it can do without looking is to guess one of
the n values: 1/n.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

N_KEYS = 64
N_VALUES = 64


@dataclass(frozen=True)
class RecallExample:
    keys: tuple[int, ...]  # distinct, in range(n_keys), one a pair
    values: tuple[int, ...]  # in range(n_values), drawn with replacement
    queries: tuple[int, ...]  # pair asked for, in order; drawn with replacement


def recall_example(
    seed: int,
    index: int,
    n_pairs: int,
    n_queries: int | None = None,
    n_keys: int = N_KEYS,
    n_values: int = N_VALUES,
) -> RecallExample:
    """Example `index` of a seed, with `n_queries` questions: as many as pairs when None."""
    n_queries = n_pairs if n_queries is None else n_queries
    if not 1 <= n_pairs <= n_keys:
        raise ValueError(
            f"n_pairs is {n_pairs}: expected 1 to {n_keys}, as the keys of an example are distinct"
        )
    if n_queries < 1:
        raise ValueError(f"n_queries is {n_queries}: expected at least 1")
    # of the random module only `random()` promises the same numbers in every Python version
    generator = random.Random(f"recall:{seed}:{index}:{n_pairs}")
    keys = _shuffled(range(n_keys), generator)[:n_pairs]
    values = [int(generator.random() * n_values) for _ in keys]
    queries = [int(generator.random() * n_pairs) for _ in range(n_queries)]
    return RecallExample(tuple(keys), tuple(values), tuple(queries))


def recall_tokens(n_keys: int = N_KEYS, n_values: int = N_VALUES) -> list[str]:
    """The special tokens of a tokenizer that knows associative recall: keys, then values."""
    return [f"<|key_{i}|>" for i in range(n_keys)] + [f"<|val_{i}|>" for i in range(n_values)]


def recall_text(example: RecallExample) -> str:
    """The example as a document of a corpus."""
    order = [*range(len(example.keys)), *example.queries]
    return "".join(f"<|key_{example.keys[i]}|><|val_{example.values[i]}|>" for i in order)


def recall_vocabulary(tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the keys and of the values it knows. Raises ValueError for a tokenizer without them."""
    vocabulary = tokenizer.get_vocab()
    tokens = recall_tokens()
    missing = [token for token in (tokens[0], tokens[N_KEYS]) if token not in vocabulary]
    if missing:
        raise ValueError(
            f"the tokenizer lacks the recall tokens, {missing[0]} for one: use the tokenizer that"
            " `python -m data.quickstart` writes"
        )
    keys = [vocabulary[token] for token in tokens[:N_KEYS] if token in vocabulary]
    return keys, [vocabulary[token] for token in tokens[N_KEYS:] if token in vocabulary]


def recall_prompt(
    example: RecallExample, key_ids: Sequence[int], value_ids: Sequence[int], start_id: int
) -> tuple[list[int], list[int], list[int]]:
    """(token ids [1 + 2 pairs + 2 queries], query positions, expected ids).

    It starts with `start_id` (end-of-text, as a document follows the one before). The logits at query
    position i answer query i: their argmax is to be expected id i. The right answers stand after the queries,
    so one forward pass scores them all.
    """
    pairs = [(key_ids[key], value_ids[value]) for key, value in zip(example.keys, example.values)]
    asked = [pairs[i] for i in example.queries]
    ids = [start_id, *(token for pair in pairs + asked for token in pair)]
    positions = [1 + 2 * len(pairs) + 2 * i for i in range(len(asked))]
    return ids, positions, [value for _, value in asked]


def _shuffled(items: Sequence[int], generator: random.Random) -> list[int]:
    draws = [generator.random() for _ in items]
    return [items[i] for i in sorted(range(len(items)), key=draws.__getitem__)]
