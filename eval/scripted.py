"""Models that follow a script: they try tasks and scoring where no model would tell right from wrong.

`model=scripted:oracle` on the command line checks that the data of a family can be read and scores 1.0.
"""

from collections.abc import Sequence
from typing import Any

from .items import GENERATE, LOGLIKELIHOOD, LOSSES, Item
from .scoring import cut_at, position_buckets

HOPELESS = -1e4  # a log probability without hope, and finite: it has to survive JSON


class ScriptedModel:
    """Reads the expected answer of an item, which a real model never sees."""

    batch_tokens = 2**20
    max_rows = 64

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def check(self, item: Item) -> None:
        item.check()

    def rows(self, kind: str) -> int:
        return self.max_rows

    def answer(self, items: Sequence[Item]) -> list[Any]:
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Any:
        if item.kind == GENERATE:
            return cut_at(self.text(item), item.stop)
        if item.kind == LOGLIKELIHOOD:
            return self.likelihood(item)
        if item.kind == LOSSES:
            loss = self.loss()
            return [[loss * (high - low), high - low] for low, high in position_buckets(len(item.tokens))]
        return self.predictions(item)

    def text(self, item: Item) -> str:
        raise NotImplementedError

    def likelihood(self, item: Item) -> tuple[float, bool]:
        raise NotImplementedError

    def predictions(self, item: Item) -> list[int]:
        raise NotImplementedError

    def loss(self) -> float:
        raise NotImplementedError


class Oracle(ScriptedModel):
    """Always right."""

    def text(self, item: Item) -> str:
        return " " + " ".join(item.answers) if item.rule == "contains_all" else f" {item.answers[0]}"

    def likelihood(self, item: Item) -> tuple[float, bool]:
        return (0.0, True) if item.answers[0] else (HOPELESS, False)

    def predictions(self, item: Item) -> list[int]:
        return list(item.answers)

    def loss(self) -> float:
        return 0.0


class Silent(ScriptedModel):
    """Says nothing, finds nothing likely."""

    def text(self, item: Item) -> str:
        return ""

    def likelihood(self, item: Item) -> tuple[float, bool]:
        return HOPELESS, False

    def predictions(self, item: Item) -> list[int]:
        return [-1] * len(item.positions)

    def loss(self) -> float:
        return -HOPELESS


class Rambling(Silent):
    """Gets to the answer by and by, on its first line."""

    def text(self, item: Item) -> str:
        return f" well, let me think, it may be {' and '.join(item.answers)} I suppose\nor not."


SCRIPTED = {"oracle": Oracle, "silent": Silent, "rambling": Rambling}


def byte_tokenizer() -> Any:
    """A tokenizer that needs no file: one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
