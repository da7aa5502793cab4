"""Triton kernel that turns a chunk of logits into losses and, in place, into the gradient of their sum."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/cross_entropy_triton.py needs triton") from error


@triton.jit
def _softmax_gradient(
    logits_ptr, labels_ptr, losses_ptr, stride, V, ignore_index, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * stride
    columns = tl.arange(0, BLOCK)
    if label == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        for start in range(0, V, BLOCK):
            zero = tl.zeros([BLOCK], dtype=logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + start + columns, zero, mask=start + columns < V)
    else:
        top = tl.full([BLOCK], float("-inf"), dtype=tl.float32)
        mass = tl.zeros(
            [BLOCK], dtype=tl.float32
        )  # a running softmax sum in every lane, merged after the loop
        for start in range(0, V, BLOCK):
            x = tl.load(logits_ptr + start + columns, mask=start + columns < V, other=float("-inf")).to(
                tl.float32
            )
            higher = tl.maximum(top, x)
            reference = tl.where(higher == float("-inf"), 0.0, higher)
            mass = mass * tl.exp(top - reference) + tl.exp(x - reference)
            top = higher
        peak = tl.max(top, axis=0)
        log_normaliser = peak + tl.log(tl.sum(mass * tl.exp(top - peak), axis=0))
        # a label that is no word: the loss is NaN, which nobody takes for a result
        own = tl.load(logits_ptr + label, mask=(label >= 0) & (label < V), other=float("nan"))
        tl.store(losses_ptr + row, log_normaliser - own.to(tl.float32))
        for start in range(0, V, BLOCK):
            inside = start + columns < V
            x = tl.load(logits_ptr + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
            gradient = tl.exp(x - log_normaliser) - tl.where(start + columns == label, 1.0, 0.0)
            tl.store(logits_ptr + start + columns, gradient.to(logits_ptr.dtype.element_ty), mask=inside)


def softmax_gradient_(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Losses `[n]` in fp32 of logits `[n, V]`, which become `softmax(logits) - onehot(labels)`."""
    rows, words = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        block = min(4096, triton.next_power_of_2(words))
        _softmax_gradient[(rows,)](
            logits, labels, losses, logits.stride(0), words, ignore_index, BLOCK=block, num_warps=8
        )
    return losses
