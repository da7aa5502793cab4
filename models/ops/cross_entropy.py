"""Cross-entropy of a linear head that never holds the logits of a whole sequence.

At 65,536 tokens and 32,000 words the logits alone take 4 GB in bf16, and their gradient as much again. Here
the head runs over chunks of tokens, and each chunk's gradients are formed while its logits are at hand,
`dlogits = softmax(logits) - onehot`, so that the backward pass only scales them. The plain definition is
`F.cross_entropy(hidden @ weight.T, labels)`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve
from .dtypes import product_dtype

_LOGIT_BYTES = 512 * 2**20  # about what one chunk of logits may take
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cross-entropy of `hidden @ weight.T` against labels, in nats, the softmax in at least fp32.

    Args:
        hidden: `[..., D]`, aligned with labels: the caller has shifted them.
        weight: `[V, D]`, the head. Under autocast, or when its dtype differs, it is used in hidden's dtype.
        labels: `[...]` integers in [0, V), or `ignore_index`.
        ignore_index: label of positions that count for nothing.
        reduction: `mean` over the counted positions (0 where there are none), `sum`, or `none`.
        chunk_size: tokens a chunk; None keeps one chunk's logits within half a gigabyte.
        backend: see `models/ops/backend.py`.

    Returns:
        A scalar, or `[...]` for `none`, in at least fp32.

    Raises:
        ValueError: unknown reduction, shapes that do not fit together, labels that are no integers, or out of
            range (looked for on a CPU alone, where looking makes nobody wait; on a GPU the loss is NaN, or
            torch's own kernels stop).
    """
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction {reduction!r} is unknown; use one of {', '.join(REDUCTIONS)}")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[-1]:
        shapes = f"hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)}, labels {tuple(labels.shape)}"
        raise ValueError(f"shapes do not fit together: {shapes}; expected [..., D], [V, D], [...]")
    _check_labels(labels, weight.shape[0], ignore_index)
    offered = ("torch",) if hidden.dtype == torch.float64 else ("triton", "torch")
    fused = resolve("linear_cross_entropy", hidden.device, offered, backend) == "triton"
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1)
    rows = rows.to(product_dtype(hidden))
    chunk = chunk_size or max(256, _LOGIT_BYTES // (weight.shape[0] * rows.element_size()) // 256 * 256)
    if reduction == "none":
        losses = [
            _checkpointed_losses(h, weight, t, ignore_index)
            for h, t in zip(rows.split(chunk), targets.split(chunk))
        ]
        return torch.cat(losses).view(labels.shape)
    total = _ChunkedCrossEntropy.apply(rows, weight, targets, ignore_index, chunk, fused)
    if reduction == "sum":
        return total
    return total / (targets != ignore_index).sum().clamp(min=1)


def _check_labels(labels: Tensor, words: int, ignore_index: int) -> None:
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    if labels.device.type == "cpu":
        strange = labels[((labels < 0) | (labels >= words)) & (labels != ignore_index)]
        if len(strange):
            raise ValueError(
                f"labels must be from 0 to {words - 1}, or {ignore_index} where nothing counts; got "
                f"{int(strange[0])}"
            )


def _checkpointed_losses(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Losses of one chunk `[n]`; its logits are computed again in the backward pass."""
    return torch.utils.checkpoint.checkpoint(
        _losses, hidden, weight, labels, ignore_index, use_reentrant=False
    )


def _losses(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of the losses; the gradients of hidden and weight are formed chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index, chunk, fused):
        with torch.autocast(hidden.device.type, enabled=False):
            head = weight.to(hidden.dtype)
            need_hidden, need_weight = ctx.needs_input_grad[:2]
            # gradients of the head add up over the chunks in fp32, whatever the compute dtype
            accumulator = torch.promote_types(hidden.dtype, torch.float32)
            total = torch.zeros((), dtype=accumulator, device=hidden.device)
            dhidden = torch.empty_like(hidden) if need_hidden else None
            dweight = (
                torch.zeros(weight.shape, dtype=accumulator, device=weight.device) if need_weight else None
            )
            for start in range(0, hidden.shape[0], chunk):
                rows = slice(start, start + chunk)
                logits = hidden[rows] @ head.T  # [chunk, V]
                losses, dlogits = _loss_and_gradient(logits, labels[rows], ignore_index, fused)
                total += losses.sum()
                if need_hidden:
                    torch.mm(dlogits, head, out=dhidden[rows])
                if need_weight:
                    _accumulate(dweight, dlogits.T, hidden[rows])
        ctx.save_for_backward(dhidden, dweight)
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, dtotal):
        dhidden, dweight = ctx.saved_tensors
        if dhidden is not None:
            dhidden = dhidden * dtotal.to(dhidden.dtype)
        if dweight is not None:
            dweight = (dweight * dtotal).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None, None


def _loss_and_gradient(
    logits: Tensor, labels: Tensor, ignore_index: int, fused: bool
) -> tuple[Tensor, Tensor]:
    """Losses `[n]` and dlogits `[n, V]` of summed losses. May overwrite `logits`."""
    if fused:
        from .cross_entropy_triton import softmax_gradient_

        return softmax_gradient_(logits, labels, ignore_index), logits
    dtype = logits.dtype
    logits = logits.to(torch.promote_types(dtype, torch.float32))
    counted = labels != ignore_index
    at = labels.clamp(min=0).unsqueeze(-1)
    log_normaliser = logits.logsumexp(-1)
    losses = (log_normaliser - logits.gather(-1, at).squeeze(-1)) * counted
    dlogits = (logits - log_normaliser.unsqueeze(-1)).exp_()
    dlogits.scatter_add_(-1, at, torch.full_like(at, -1, dtype=dlogits.dtype))
    return losses, (dlogits * counted.unsqueeze(-1)).to(dtype)


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, total in fp32 (or fp64) also where the factors are bf16."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right
