"""Held-out loss, as a whole and by position in the sequence: does the model use far context?"""

import torch

from models.language_model import IGNORED
from training.distribution import Distribution


def position_edges(max_len: int, smallest: int = 16, halvings: int = 8) -> list[int]:
    """Bucket borders 0, ..., max_len, each the double of the one before: 65536 -> 0, 256, 512, ..., 65536."""
    halves = (max_len >> k for k in range(halvings, -1, -1))
    return [0, *(edge for edge in halves if edge >= min(smallest, max_len))]


@torch.no_grad()
def heldout_loss(distribution: Distribution, batches: list[dict], max_len: int) -> dict[str, object]:
    """Mean loss of held-out sequences, in nats a token.

    Args:
        batches: this rank's share, as many on every rank; labels of padding sequences are all IGNORED.

    Returns:
        val_loss, and val_loss_by_position: {"first-last position": loss}.
    """
    edges = position_edges(max_len)
    sums = torch.zeros(2, max_len, dtype=torch.float64, device=distribution.device)  # loss, count by position
    engine = distribution.engine
    engine.eval()
    for batch in batches:
        losses, labels = token_losses(distribution, batch)  # [b, T-1] each
        counted = labels != IGNORED
        sums[0, 1 : losses.shape[1] + 1] += torch.where(counted, losses, 0.0).sum(0)
        sums[1, 1 : losses.shape[1] + 1] += counted.sum(0)
    engine.train()
    distribution.sum(sums)
    total, count = sums.sum(1).tolist()
    by_position = {}
    for first, last in zip(edges[:-1], edges[1:]):
        loss, tokens = sums[:, first:last].sum(1).tolist()
        if tokens:
            by_position[f"{first}-{last - 1}"] = loss / tokens
    return {"val_loss": total / count if count else None, "val_loss_by_position": by_position}


def token_losses(distribution: Distribution, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every predicted token and the token itself, [b, T-1] each."""
    inputs = model_inputs(batch, distribution.device)
    labels = inputs["labels"][:, 1:]
    with distribution.autocast():
        loss = distribution.engine(**inputs, loss_reduction="none", use_cache=False).loss
    return loss.float().reshape(labels.shape), labels


def model_inputs(batch: dict, device: torch.device) -> dict[str, torch.Tensor]:
    """The tensors of a loader's batch, on the device."""
    keys = ("input_ids", "labels", "cu_seqlens")
    return {key: batch[key].to(device, non_blocking=True) for key in keys if batch.get(key) is not None}
