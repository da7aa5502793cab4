"""Held-out loss, as a whole and by position in the sequence: does the model use far context?"""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from models.language_model import IGNORED
from training.distribution import Distribution


def position_edges(max_len: int, smallest: int = 16, halvings: int = 8) -> list[int]:
    """Bucket borders 0, ..., max_len, each the double of the one before: 65536 -> 0, 256, 512, ..., 65536."""
    halves = (max_len >> k for k in range(halvings, -1, -1))
    return [0, *(edge for edge in halves if edge >= min(smallest, max_len))]


@torch.no_grad()
def heldout_loss(distribution: Distribution, batches: Iterable[dict], max_len: int) -> dict[str, Any]:
    """Mean loss of held-out sequences, in nats a token.

    Args:
        batches: this rank's share, as many on every rank; what only fills up has the label IGNORED.

    Returns:
        val_loss, and val_loss_by_position: {"first-last position of the predicted token": loss}.
    """
    sums = torch.zeros(
        2, max_len, dtype=torch.float64, device=distribution.device
    )  # loss and count by position
    distribution.engine.eval()
    for batch in batches:
        inputs = model_inputs(batch, distribution.device)
        labels = inputs["labels"]
        with distribution.autocast():
            losses = distribution.engine(
                **inputs, loss_reduction="none", logits_to_keep=1, use_cache=False
            ).loss
        counted = F.pad(labels[:, 1:], (0, 1), value=IGNORED) != IGNORED  # position t predicts label t + 1
        # with isolated documents the rows lie end to end
        sums[0] += losses.double().reshape(-1, max_len).sum(0).roll(1)
        sums[1] += counted.reshape(-1, max_len).sum(0).roll(1)
    distribution.engine.train()
    distribution.sum(sums)
    total, count = sums.sum(1).tolist()
    edges = position_edges(max_len)
    by_position = {}
    for first, last in pairwise(edges):
        loss, tokens = sums[:, first:last].sum(1).tolist()
        by_position[f"{first}-{last - 1}"] = loss / tokens if tokens else None
    return {"val_loss": total / count if count else None, "val_loss_by_position": by_position}


def model_inputs(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a loader's batch, on the device."""
    keys = ("input_ids", "labels", "cu_seqlens")
    return {key: batch[key].to(device, non_blocking=True) for key in keys if batch.get(key) is not None}
