"""The causal convolution on CUDA, kernels of this repository: convolution, bias and SiLU, one pass each way.

Only the inputs are kept for the backward pass, which repeats the convolution on them.
"""

import torch
from torch import Tensor

from .conv_triton_kernels import backward_kernel, forward_kernel, initial_gradient_kernel

try:
    import triton
except ImportError as error:
    raise ImportError("models/ops/conv_triton.py needs triton") from error

# TOKENS: as many share one partial gradient of the weights, and read three more on each side
FORWARD = {"TOKENS": 128, "BLOCK": 256, "num_warps": 2}
BACKWARD = {"TOKENS": 128, "BLOCK": 256, "num_warps": 2}


def conv_triton(x, weight, bias, activation, initial_state, cu_seqlens) -> Tensor:
    """`causal_conv1d` of `models/ops/conv.py` on these kernels, without the final state."""
    return _Convolution.apply(x, weight, bias, initial_state, cu_seqlens, activation == "silu")


def bounds_of(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """How many tokens of its sequence lie before every token (3: or more), and its sequence."""
    if cu_seqlens is None:
        return None, None
    tokens = torch.arange(x.shape[1], device=x.device)
    offsets = cu_seqlens.to(device=x.device, dtype=torch.long)
    sequence = torch.searchsorted(offsets, tokens, right=True) - 1
    return (tokens - offsets[sequence]).clamp_max(3).to(torch.int32), sequence


def _rows(t: Tensor) -> Tensor:
    """The tensor itself where a constant stride leads from token to token through all rows, else a copy."""
    if t.stride(2) == 1 and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)):
        return t
    return t.contiguous()


def _grid(x: Tensor, config: dict) -> tuple[int, int, int]:
    batch, length, channels = x.shape
    return triton.cdiv(channels, config["BLOCK"]), triton.cdiv(length, config["TOKENS"]), batch


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, cu_seqlens, silu):
        x = _rows(x)
        y, past, sequence = convolve(x, weight, bias, initial_state, cu_seqlens, silu)
        ctx.save_for_backward(x, weight, bias, initial_state, past, sequence, cu_seqlens)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, *saved = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        return dx, *convolve_backward(_rows(dy), x, *saved, ctx.silu, dx), None, None


def convolve(x, weight, bias, initial_state, cu_seqlens, silu) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The forward kernel: y, and for packed sequences the bounds that `convolve_backward` wants."""
    past, sequence = bounds_of(x, cu_seqlens)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    initial_state = None if initial_state is None else initial_state.contiguous()
    forward_kernel[_grid(x, FORWARD)](
        x, weight.contiguous(), bias, initial_state, past, sequence, y, x.shape[1], x.shape[2], x.stride(1),
        **_options(weight, bias, initial_state, past, silu), **FORWARD,
    )  # fmt: skip
    return y, past, sequence


def convolve_backward(
    dy, x, weight, bias, initial_state, past, sequence, cu_seqlens, silu, dx
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Fills dx `[B, T, D]`, of any stride between tokens; gradients of weight, bias and initial state."""
    channels, width = weight.shape
    weight = weight.contiguous()
    initial_state = None if initial_state is None else initial_state.contiguous()
    options = _options(weight, bias, initial_state, past, silu)
    grid = _grid(x, BACKWARD)
    parts = torch.empty(grid[1] * grid[2], width + 1, channels, dtype=torch.float32, device=x.device)
    backward_kernel[grid](
        dy, x, weight, bias, initial_state, past, sequence, dx, parts, x.shape[1], channels, x.stride(1),
        dy.stride(1), dx.stride(1), **options, **BACKWARD,
    )  # fmt: skip
    parts = parts.sum(0)
    dinitial = None
    if initial_state is not None:
        dinitial = _initial_gradient(dy, x, weight, bias, initial_state, cu_seqlens, options)
    dbias = None if bias is None else parts[width].to(bias.dtype)
    return parts[:width].t().to(weight.dtype), dbias, dinitial


def _options(weight, bias, initial_state, past, silu: bool) -> dict:
    """The constants the kernels are compiled for."""
    return {
        "W": weight.shape[1], "SILU": silu, "HAS_BIAS": bias is not None,
        "HAS_INITIAL": initial_state is not None, "PACKED": past is not None,
    }  # fmt: skip


def _initial_gradient(dy, x, weight, bias, initial_state, cu_seqlens, options: dict) -> Tensor:
    batch, length, channels = x.shape
    if cu_seqlens is None:
        offsets = torch.arange(batch + 1, device=x.device) * length
    else:
        offsets = cu_seqlens.to(device=x.device, dtype=torch.long)
    dinitial = torch.empty_like(initial_state)
    initial_gradient_kernel[(triton.cdiv(channels, 128), offsets.numel() - 1)](
        dy, x, weight, bias, initial_state, offsets, dinitial, channels, x.stride(1), dy.stride(1), BLOCK=128,
        **{name: options[name] for name in ("W", "SILU", "HAS_BIAS")},
    )  # fmt: skip
    return dinitial
