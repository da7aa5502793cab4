"""Generated text: the same on every machine, of any length, with needles at given depths."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .items import as_tokens, encode

LONG = 2**16  # characters of a text that is tokenised sentence by sentence

words = str.split  # each list below is drawn from by `pick`
SUBJECTS = words("""
    farmer teacher painter sailor baker doctor singer miller gardener traveller shepherd clockmaker librarian
    carpenter fisherman weaver postman student neighbour captain potter jeweller tailor cook
""")
ADJECTIVES = words("""
    old young quiet cheerful tired careful tall patient curious gentle stubborn honest clever lonely proud
    friendly nervous famous humble weary
""")
VERBS = words("""
    found carried painted sold repaired borrowed watched hid counted cleaned forgot described measured bought
    polished moved kept showed wrapped drew
""")
OBJECTS = words("""
    lantern basket letter bicycle violin ladder kettle blanket window map clock boat hammer mirror chair coat
    bottle bridge fence garden book ribbon candle wagon
""")
PLACES = words("""
    harbour market orchard station mill forest valley church kitchen library river hill square bakery meadow
    lighthouse workshop garden cellar road
""")
TIMES = (
    "in the morning",
    "after lunch",
    "before sunset",
    "late at night",
    "on a rainy day",
    "during the winter",
    "last spring",
    "at noon",
    "on Sunday",
    "when the snow melted",
    "in early autumn",
    "after the storm",
)


def pick(options: Sequence[Any], draw: random.Random) -> Any:
    # `random()` is what Python promises to keep for a seed; choice and shuffle are not
    return options[int(draw.random() * len(options))]


def number(digits: int, draw: random.Random) -> str:
    low = 10 ** (digits - 1)
    return str(low + int(draw.random() * 9 * low))


def sentence(draw: random.Random) -> str:
    subject = f"{pick(ADJECTIVES, draw)} {pick(SUBJECTS, draw)}"
    thing = f"{pick(ADJECTIVES, draw)} {pick(OBJECTS, draw)}"
    return f"The {subject} {pick(VERBS, draw)} the {thing} near the {pick(PLACES, draw)} {pick(TIMES, draw)}."


def with_needles(units: Sequence[str], needles: Sequence[tuple[float, str]]) -> str:
    """The units with each needle put in at its depth: 0 before the first unit, 1 after the last."""
    text = list(units)
    for depth, needle in sorted(needles, key=lambda pair: -pair[0]):
        text.insert(round(depth * len(units)), needle)
    return " ".join(text)


def spread(depths: Sequence[float], count: int) -> list[float]:
    """`count` depths that use the given ones evenly; fewer than all are taken evenly from them."""
    if count >= len(depths):
        return [depths[i % len(depths)] for i in range(count)]
    return [depths[round(i * (len(depths) - 1) / max(count - 1, 1))] for i in range(count)]


def encode_long(tokenizer: Any, text: str, known: dict[str, list[int]]) -> np.ndarray:
    """What `encode` answers, sooner for a long generated text: each different sentence is tokenised once.

    A million tokens at once take seconds, which is as long as a GPU takes to read them. Tokenizers that
    the beginnings of the sentences show to look across sentences get the whole text.

    Args:
        known: tokens of sentences, kept from call to call for one tokenizer.
    """
    if len(text) < LONG:
        return encode(tokenizer, text)
    first, *rest = sentences_of(text)
    examples = list({sentence.split(" ", 1)[0]: sentence for sentence in rest}.values())
    whole = encode(tokenizer, " ".join([first, *examples])).tolist()
    for space in (" ", ""):  # the one between two sentences: tokenizers like Llama's put it there themselves
        if _joined(tokenizer, space, first, examples, {}) == whole:
            return as_tokens(_joined(tokenizer, space, first, rest, known))
    return encode(tokenizer, text)


def sentences_of(text: str) -> list[str]:
    *all_but_last, last = text.split(". ")
    return [*(f"{sentence}." for sentence in all_but_last), last]


def _joined(
    tokenizer: Any, space: str, first: str, rest: Sequence[str], known: dict[str, list[int]]
) -> list[int]:
    new = [sentence for sentence in dict.fromkeys(rest) if sentence not in known]
    if new:
        encoded = tokenizer([space + sentence for sentence in new], add_special_tokens=False, verbose=False)
        known.update(zip(new, encoded["input_ids"], strict=True))
    head = encode(tokenizer, first).tolist()
    return [*head, *itertools.chain.from_iterable(known[sentence] for sentence in rest)]


def fit(write: Callable[[int], str], tokenizer: Any, budget: int) -> np.ndarray:
    """Tokens of the longest text write(n units) within the budget, to about one unit.

    Raises:
        ValueError: not even one unit fits.
    """
    known: dict[str, list[int]] = {}

    def tokens_of(units: int) -> np.ndarray:
        return encode_long(tokenizer, write(units), known)

    least = len(tokens_of(1))
    if least > budget:
        raise ValueError(
            f"a length that leaves {budget} tokens for the prompt is too short: the question alone takes "
            f"{least}; ask for a greater one"
        )
    per_unit = max((len(tokens_of(65)) - least) / 64, 1.0)
    units = 1 + int((budget - least) / per_unit)
    best = None
    for _ in range(50):
        tokens = tokens_of(units)
        room = budget - len(tokens)
        if room >= 0:
            best = tokens
            if room < 2 * per_unit or (units > 1 and len(tokens) > 0.995 * budget):
                return tokens
            units += max(int(room / per_unit) - 1, 1)
        elif best is not None:
            return best
        else:
            units = max(units - max(1, math.ceil(-room / per_unit)), 1)
    return tokens_of(1) if best is None else best
