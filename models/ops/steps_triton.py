"""Mamba2's step sizes on CUDA, dt = clamp(softplus(raw + dt_bias)), and the way back, one pass each."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/steps_triton.py needs triton") from error

_TOKENS = 64  # of a program
_PROGRAMS = 1056  # partial sums of dt_bias's gradient at most: eight waves of 132 multiprocessors


@triton.jit
def _softplus(x):
    # log(1 + e) loses digits where e is small; the series is good to 1e-6 below 0.1
    e = tl.exp(-tl.abs(x))
    series = e * (1 - e * (1 / 2 - e * (1 / 3 - e * (1 / 4 - e * (1 / 5 - e / 6)))))
    return tl.maximum(x, 0.0) + tl.where(e < 0.1, series, tl.log(1 + e))


@triton.jit
def _steps_kernel(
    raw_ptr, bias_ptr, dt_ptr, tokens, raw_stride, low, high,
    H: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """dt [tokens, H] in fp32. Grid: (tokens / TOKENS,)."""
    token, head = (
        (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None],
        tl.arange(0, HEADS),
    )
    known = (token < tokens) & (head < H)[None, :]
    bias = tl.load(bias_ptr + head, mask=head < H, other=0.0).to(tl.float32)
    x = tl.load(raw_ptr + token * raw_stride + head[None, :], mask=known, other=0.0).to(tl.float32) + bias
    dt = _softplus(x)
    dt = tl.where(dt < low, low, tl.where(dt > high, high, dt))  # NaN stays NaN
    tl.store(dt_ptr + token * H + head[None, :], dt, mask=known)


@triton.jit
def _steps_backward_kernel(
    raw_ptr, bias_ptr, ddt_ptr, draw_ptr, dbias_ptr, tokens, tokens_per_program, raw_stride, draw_stride, low,
    high, H: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """draw, and each program's part of dbias [programs, H]. Grid: (programs,)."""
    head = tl.arange(0, HEADS)
    bias = tl.load(bias_ptr + head, mask=head < H, other=0.0).to(tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    first = tl.program_id(0).to(tl.int64) * tokens_per_program
    for start in range(first, first + tokens_per_program, TOKENS):
        token = (start + tl.arange(0, TOKENS))[:, None]
        known = (token < tokens) & (head < H)[None, :]
        x = tl.load(raw_ptr + token * raw_stride + head[None, :], mask=known, other=0.0).to(tl.float32) + bias
        ddt = tl.load(ddt_ptr + token * H + head[None, :], mask=known, other=0.0)
        dt = _softplus(x)
        draw = tl.where((dt < low) | (dt > high), 0.0, ddt * tl.sigmoid(x))
        total += tl.sum(draw, axis=0)
        at = draw_ptr + token * draw_stride + head[None, :]
        tl.store(at, draw.to(draw_ptr.dtype.element_ty), mask=known)
    tl.store(dbias_ptr + tl.program_id(0) * H + head, total, mask=head < H)


def step_sizes(raw: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """dt in fp32 from raw, both `[tokens, H]` (raw's rows of any stride)."""
    tokens, heads = raw.shape
    dt = torch.empty(tokens, heads, dtype=torch.float32, device=raw.device)
    _steps_kernel[(triton.cdiv(tokens, _TOKENS),)](
        raw, bias, dt, tokens, raw.stride(0), *(float(x) for x in limit),
        H=heads, HEADS=triton.next_power_of_2(heads), TOKENS=_TOKENS,
    )  # fmt: skip
    return dt


def step_sizes_backward(
    raw: Tensor, bias: Tensor, ddt: Tensor, draw: Tensor, limit: tuple[float, float]
) -> Tensor:
    """Fills draw (rows of any stride); returns the gradient of the bias `[H]` in fp32."""
    tokens, heads = raw.shape
    share = triton.cdiv(triton.cdiv(tokens, _PROGRAMS), _TOKENS) * _TOKENS
    programs = triton.cdiv(tokens, share)
    dbias = torch.empty(programs, heads, dtype=torch.float32, device=raw.device)
    _steps_backward_kernel[(programs,)](
        raw, bias, ddt, draw, dbias, tokens, share, raw.stride(0), draw.stride(0),
        *(float(x) for x in limit), H=heads, HEADS=triton.next_power_of_2(heads), TOKENS=_TOKENS,
    )  # fmt: skip
    return dbias.sum(0)
