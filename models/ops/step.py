"""When a decoding step runs as one of the kernels in step_triton.py."""

import torch
from torch import Tensor

from .backend import resolve


def one_kernel(operator: str, x: Tensor, *others: Tensor | None) -> bool:
    """Whether `operator` steps over one token x [B, 1, ...] in a kernel, which has no gradients."""
    if x.shape[1] != 1 or x.numel() == 0 or torch.is_grad_enabled():
        return False
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in (x, *others)):
        return False
    return resolve(operator, x.device, ("triton", "torch")) == "triton"
