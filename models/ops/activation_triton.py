"""Triton kernels of SwiGLU: one read of each input, one write of each output."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/activation_triton.py needs triton") from error

_BLOCK = 2048


@triton.jit
def _swiglu_forward(gate_ptr, up_ptr, y_ptr, elements, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=at < elements, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=at < elements)


@triton.jit
def _swiglu_backward(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, y_ptr, elements, WRITE_Y: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sigma = tl.sigmoid(gate)
    act = gate * sigma
    tl.store(dup_ptr + at, (dy * act).to(dup_ptr.dtype.element_ty), mask=inside)
    dgate = dy * up * sigma * (1.0 + gate * (1.0 - sigma))
    tl.store(dgate_ptr + at, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)
    if WRITE_Y:
        tl.store(y_ptr + at, (act * up).to(y_ptr.dtype.element_ty), mask=inside)


def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` of contiguous tensors."""
    y = torch.empty_like(gate)
    _swiglu_forward[(triton.cdiv(gate.numel(), _BLOCK),)](
        gate, up, y, gate.numel(), BLOCK=_BLOCK, num_warps=8
    )
    return y


def swiglu_backward(
    dy: Tensor, gate: Tensor, up: Tensor, *, recompute: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of gate and up, and, with `recompute`, the product itself from the same pass."""
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    y = torch.empty_like(gate) if recompute else None
    _swiglu_backward[(triton.cdiv(gate.numel(), _BLOCK),)](
        dy, gate, up, dgate, dup, y, gate.numel(), WRITE_Y=recompute, BLOCK=_BLOCK, num_warps=8
    )
    return dgate, dup, y


class _FusedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return swiglu_forward(gate, up)

    @staticmethod
    def backward(ctx, dy):
        dgate, dup, _ = swiglu_backward(dy.contiguous(), *ctx.saved_tensors, recompute=False)
        return dgate, dup


def fused_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up` with gradients, `[..., D]`."""
    return _FusedSwiGLU.apply(gate, up)
