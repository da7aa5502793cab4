"""Associative recall: pairs of a key and a value, then the keys again in another order, each to be answered.

    <|key_3|><|val_9|><|key_7|><|val_1|> ... <|key_7|><|val_1|><|key_3|><|val_9|>

Multi-query associative recall (MQAR) of Zoology, arXiv 2312.04927, section 4, without its power-law gaps: a
model answers as many pairs as its recurrent state holds. As documents of a corpus the plain language-model
loss trains it. An example is a function of (seed, index) alone, the same on every machine and Python version.
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
    queries: tuple[int, ...]  # pair asked for, in order


def recall_example(
    seed: int,
    index: int,
    n_pairs: int,
    n_queries: int | None = None,
    n_keys: int = N_KEYS,
    n_values: int = N_VALUES,
    rounds: int = 1,
) -> RecallExample:
    """Example `index` of a seed; each round asks for all pairs, or `n_queries` of them, in random order."""
    n_queries = n_pairs if n_queries is None else n_queries
    if not 1 <= n_pairs <= n_keys:
        raise ValueError(
            f"n_pairs is {n_pairs}: expected 1 to {n_keys}, as the keys of an example are distinct"
        )
    if not 1 <= n_queries <= n_pairs:
        raise ValueError(f"n_queries is {n_queries}: expected 1 to n_pairs ({n_pairs})")
    # of the random module only `random()` promises the same numbers in every Python version
    generator = random.Random(f"recall:{seed}:{index}:{n_pairs}")
    keys = _shuffled(range(n_keys), generator)[:n_pairs]
    values = [int(generator.random() * n_values) for _ in keys]
    queries = [query for _ in range(rounds) for query in _shuffled(range(n_pairs), generator)[:n_queries]]
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
