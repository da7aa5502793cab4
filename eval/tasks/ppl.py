"""Perplexity by position on any corpus folder: does a model predict better the more it has read?

Documents are laid end to end with end-of-text after each, as in training, and read in windows of exactly
`length` tokens. The score of a window is the geometric mean of the probabilities of its tokens, 1 /
perplexity.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import open_corpus
from data.corpus import Corpus
from data.lines import BrokenLineError, parse_document, read_lines

from ..items import LOSSES, Item, as_tokens, encode
from ..registry import Family, register
from ..settings import Settings

DEFAULT_LENGTHS = (4096,)
DEFAULT_ITEMS = 16


def documents(corpus: Path) -> Iterator[str]:
    """Texts of the corpus in file order. Raises ValueError for a damaged file."""
    for file in open_corpus(corpus).files:
        for line in read_lines(file.path):
            try:
                if line.problem:
                    raise BrokenLineError(line.problem)
                text = parse_document(line.raw)
            except BrokenLineError as error:
                raise ValueError(f"{file.path} line {line.number + 1}: {error}") from None
            if text:
                yield text


def build(task: str, settings: Settings, tokenizer: Any) -> Iterator[Item]:
    count = settings.limit or DEFAULT_ITEMS
    for length in settings.lengths_or(*DEFAULT_LENGTHS):
        index = -1
        for index, window in zip(range(count), windows(settings.corpus, tokenizer, length)):
            yield Item(
                task=task,
                key=f"length={length}/{index}",
                kind=LOSSES,
                tokens=as_tokens(window),
                rule="token_probability",
                budget=length,
                group={"length": length},
            )
        if index < 0:
            raise ValueError(f"{settings.corpus} holds fewer than {length} tokens: choose shorter lengths")


def windows(corpus: Path, tokenizer: Any, length: int) -> Iterator[list[int]]:
    """Consecutive token windows, until the corpus ends; what is left over at its end is not used."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    held: list[int] = []
    for text in documents(corpus):
        held += [*encode(tokenizer, text, special=False).tolist(), *end]
        while len(held) >= length:
            yield held[:length]
            held = held[length:]


def check(settings: Settings) -> None:
    if settings.corpus is not None:
        corpus = open_corpus(settings.corpus)  # raises for a folder that is none
        if not isinstance(corpus, Corpus):
            raise ValueError(
                f"corpus={settings.corpus} holds tokens of one tokenizer; ppl needs text, as jsonl files"
            )


def lacks(task: str, settings: Settings) -> str | None:
    if settings.corpus is not None:
        return None
    return "no corpus is named: corpus=DIR with jsonl files (python -m data.quickstart out=DIR makes one)"


def count(task: str, settings: Settings) -> int:
    return len(settings.lengths_or(*DEFAULT_LENGTHS)) * (settings.limit or DEFAULT_ITEMS)


register(Family(name="ppl", tasks=("ppl",), build=build, lacks=lacks, check=check, count=count))
