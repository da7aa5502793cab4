"""SwiGLU: `silu(gate) * up` (arXiv 2002.05202, eq. 6), fused in one pass on CUDA."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """`silu(gate) * up`, computed in at least fp32.

    Args:
        gate: `[..., D]`.
        up: `[..., D]`, of the same dtype.
        backend: see `models/ops/backend.py`.

    Returns:
        `[..., D]` in the inputs' dtype.
    """
    offered = ("torch",) if gate.dtype == torch.float64 or gate.numel() == 0 else ("triton", "torch")
    if resolve("swiglu", gate.device, offered, backend) == "triton":
        from .activation_triton import fused_swiglu

        return fused_swiglu(gate, up)
    dtype = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(dtype)) * up.to(dtype)).to(gate.dtype)
