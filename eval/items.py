"""One question to a model, and the fingerprint under which its answer is kept."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

GENERATE = "generate"  # tokens -> text, greedily
LOGLIKELIHOOD = "loglikelihood"  # log probability of the last `continuation` tokens
PREDICT = "predict"  # the likeliest next token at some positions
LOSSES = "losses"  # the loss of every token but the first


@dataclass(frozen=True, eq=False)
class Item:
    """A model reads `tokens` and the fields that steer it; `answers` are for scoring alone.

    Attributes:
        task, key: where the item belongs; the key is unique within its task and the same on every machine.
        kind: one of the constants above.
        tokens: [T] int32, the whole prompt. Nothing is ever cut from it.
        answers: accepted texts (generate), expected token ids (predict), or (gold,) of a likelihood.
        rule: name of the rule in `scoring.RULES`.
        max_new_tokens, stop: how far to generate, and the texts that end it.
        positions: where to predict; the answer i is the token after position i.
        continuation: how many tokens at the end are scored (loglikelihood).
        budget: prompt and new tokens together may not exceed it; None means no limit.
        group: what results are broken down by, such as {"length": 1024, "depth": 0.5}.
    """

    task: str
    key: str
    kind: str
    tokens: np.ndarray
    answers: tuple[Any, ...] = ()
    rule: str = "contains"
    max_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    positions: tuple[int, ...] = ()
    continuation: int = 0
    budget: int | None = None
    group: dict[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.tokens) + self.max_new_tokens

    def check(self) -> None:
        """Raises ValueError for a prompt that does not fit: it would have to be cut, and nothing is."""
        if not len(self.tokens):
            raise ValueError(f"{self.task} {self.key}: the prompt is empty")
        if self.budget is not None and self.size > self.budget:
            raise ValueError(
                f"{self.task} {self.key}: {len(self.tokens)} prompt tokens and {self.max_new_tokens} new "
                f"ones exceed its {self.budget}, and prompts are never cut; ask for a greater length"
            )

    def fingerprint(self, identity: str) -> str:
        """Names the answer of the model `identity` to this item: any change of either gives another name."""
        fields = {name: value for name, value in vars(self).items() if name != "tokens"}
        digest = hashlib.sha256(json.dumps([identity, fields], sort_keys=True, default=str).encode())
        digest.update(np.ascontiguousarray(self.tokens, dtype="<i4").tobytes())
        return digest.hexdigest()[:32]


def as_tokens(ids: Sequence[int]) -> np.ndarray:
    return np.asarray(ids, dtype=np.int32)


def encode(tokenizer: Any, text: str, special: bool = True) -> np.ndarray:
    """Token ids [T] of a text; never cut, whatever length the tokenizer's folder names."""
    ids = tokenizer(text, add_special_tokens=special, truncation=False, verbose=False)["input_ids"]
    return as_tokens(ids)
