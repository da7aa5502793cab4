"""Rules that turn an answer into a score between 0 and 1, and intervals over many of them."""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .items import Item


def contains(answer: str, item: Item) -> float:
    """Does any accepted text occur in the continuation ("Just read twice", 2407.05483)?

    Letter case aside, and how wide white space is: answers in documents have double spaces and line breaks.
    """
    continuation = _plain(answer)
    return float(any(_plain(text) in continuation for text in item.answers if text.strip()))


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def contains_all(answer: str, item: Item) -> float:
    """The share of the accepted texts that occur in the continuation (RULER, 2404.06654)."""
    return sum(text.lower() in answer.lower() for text in item.answers) / len(item.answers)


def first_number(answer: str, item: Item) -> float:
    """Is the first number of the continuation the passkey? Listing many numbers does not help."""
    found = re.search(r"\d+", answer)
    return float(found is not None and found.group() in item.answers)


def first_line(answer: str, item: Item) -> float:
    """Is the first line of the continuation the label itself, letter case and a full stop aside?"""
    line = answer.strip().split("\n")[0].strip().rstrip(".").lower()
    return float(line in [text.lower() for text in item.answers])


def predictions(answer: Sequence[int], item: Item) -> float:
    """The share of positions where the likeliest token is the expected one."""
    return sum(int(a) == int(b) for a, b in zip(answer, item.answers, strict=True)) / len(item.answers)


def token_probability(answer: Sequence[Sequence[float]], item: Item) -> float:
    """Geometric mean of the probabilities given to the true tokens: exp(-loss), 1/perplexity."""
    total, count = (sum(column) for column in zip(*answer, strict=True))
    return math.exp(-total / count)


def from_harness(answer: Any, item: Item) -> float:
    """lm-eval scores whole documents itself; a request of one has no score of its own."""
    return math.nan


RULES: dict[str, Callable[[Any, Item], float]] = {
    rule.__name__: rule
    for rule in (
        contains,
        contains_all,
        first_number,
        first_line,
        predictions,
        token_probability,
        from_harness,
    )
}


def cut_at(text: str, stops: Sequence[str]) -> str:
    """The text before the first of the stop texts."""
    ends = [text.index(stop) for stop in stops if stop and stop in text]
    return text[: min(ends)] if ends else text


def bootstrap_interval(scores: Sequence[float], resamples: int = 1000, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the mean, by resampling the items with replacement."""
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 0:
        return math.nan, math.nan
    draws = np.random.default_rng(seed)
    sums = [values.take(draws.integers(0, len(values), len(values))).sum() for _ in range(resamples)]
    low, high = np.percentile(np.asarray(sums) / len(values), [2.5, 97.5])
    return float(low), float(high)


def position_buckets(length: int) -> list[tuple[int, int]]:
    """Ranges of token positions, each twice as long as the one before: [1, 64), [64, 128), [128, 256), ..."""
    edges = [1, 64]
    while edges[-1] < length:
        edges.append(edges[-1] * 2)
    return [(low, min(high, length)) for low, high in itertools.pairwise(edges) if low < length]
