"""What is measured along a run: recall by number of pairs, and the loss on held-out text. Fixed batches."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .corpus import RecallTest, StudyCorpus
from .settings import Settings


def autocast(settings: Settings, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, torch.bfloat16) if settings.dtype == "bf16" else nullcontext()


@torch.no_grad()
def measure(model: nn.Module, corpus: StudyCorpus, settings: Settings) -> dict[str, Any]:
    """{"recall": {pairs: share of questions answered}, "text_loss": nats a token, None when not finite}."""
    model.eval()
    with autocast(settings, corpus.text.device):
        counts = [_answered(model, test, settings.rows) for test in corpus.tests]
        loss = _text_loss(model, corpus.held_out, settings.rows)
    model.train()
    asked = [test.answers.numel() for test in corpus.tests]
    shares = (torch.stack(counts).cpu() / torch.tensor(asked)).tolist()
    recall = {str(test.pairs): round(share, 5) for test, share in zip(corpus.tests, shares)}
    loss = loss.item()
    return {"recall": recall, "text_loss": round(loss, 5) if math.isfinite(loss) else None}


def _answered(model: nn.Module, test: RecallTest, rows: int) -> Tensor:
    right = [
        (_logits(model, tokens, test.positions).argmax(-1) == answers).sum()
        for tokens, answers in zip(test.tokens.split(rows), test.answers.split(rows))
    ]
    return torch.stack(right).sum()


def _logits(model: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    return model(input_ids=tokens, logits_to_keep=positions, use_cache=False).logits  # [R, Q, vocabulary]


def _text_loss(model: nn.Module, held_out: Tensor, rows: int) -> Tensor:
    sums, n_rows = [], 0
    for part in held_out.long().split(rows):
        loss = model(input_ids=part, labels=part, logits_to_keep=1, use_cache=False).loss
        sums.append(loss.float() * len(part))
        n_rows += len(part)
    return torch.stack(sums).sum() / n_rows


def mean_recall(point: dict[str, Any]) -> float:
    """Mean over the test sizes: the study's one number for recall."""
    return sum(point["recall"].values()) / len(point["recall"])
