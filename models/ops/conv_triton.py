"""Triton kernels of the causal convolution: convolution, bias and SiLU in one pass each way.

Inputs may be a slice of a wider projection: only the channel axis must be contiguous. A token knows the
bounds of its sequence, and inputs before them come from the initial state or are zero. The backward repeats
the convolution on inputs that the tile has loaded anyway: nothing but the inputs is kept.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/conv_triton.py needs triton") from error

FORWARD = {"ROWS": 64, "BLOCK": 64, "num_warps": 4}
BACKWARD = {"ROWS": 32, "BLOCK": 64, "num_warps": 8}
TOKENS_PER_PROGRAM = 256  # of the backward: as many tokens share one partial gradient of the weights


@triton.jit
def _input(x_ptr, initial_ptr, token, start, end, sequence, channel, x_stride, D, known,
           W: tl.constexpr, HAS_INITIAL: tl.constexpr):  # fmt: skip
    """Inputs `[rows, channels]` of tokens, also before their sequence (initial state) or behind it (0)."""
    inside = (token >= start) & (token < end)
    x = tl.load(x_ptr + token[:, None] * x_stride + channel[None, :], mask=inside[:, None] & known, other=0.0)
    x = x.to(tl.float32)
    if HAS_INITIAL:
        before = (token < start)[:, None] & known
        place = (sequence[:, None] * D + channel[None, :]) * (W - 1) + (token - start + W - 1)[:, None]
        x += tl.load(initial_ptr + place, mask=before, other=0.0).to(tl.float32)
    return x


@triton.jit
def _bounds(sequence_ptr, offsets_ptr, token, tokens):
    """Sequence of every token, its first token, and the token behind its last one."""
    known = token < tokens
    sequence = tl.load(sequence_ptr + token, mask=known, other=0)
    start = tl.load(offsets_ptr + sequence)
    end = tl.load(offsets_ptr + sequence + 1)
    return sequence, start, end, known


@triton.jit
def _before_activation(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, token, start, end, sequence, channel, x_stride, D, known,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    total = tl.zeros(known.shape, tl.float32)
    if HAS_BIAS:
        total += tl.load(bias_ptr + channel, mask=channel < D, other=0.0).to(tl.float32)[None, :]
    for w in tl.static_range(W):
        weight = tl.load(weight_ptr + channel * W + w, mask=channel < D, other=0.0).to(tl.float32)
        back = token - (W - 1 - w)
        x = _input(
            x_ptr, initial_ptr, back, start, end, sequence, channel, x_stride, D, known, W, HAS_INITIAL
        )
        total += weight[None, :] * x
    return total


@triton.jit
def _forward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, sequence_ptr, offsets_ptr, y_ptr, tokens, D, x_stride,
    W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sequence, start, end, real = _bounds(sequence_ptr, offsets_ptr, token, tokens)
    known = real[:, None] & (channel < D)[None, :]
    total = _before_activation(
        x_ptr, weight_ptr, bias_ptr, initial_ptr, token, start, end, sequence, channel, x_stride, D, known,
        W, HAS_BIAS, HAS_INITIAL,
    )  # fmt: skip
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y_ptr + token[:, None] * D + channel[None, :], total.to(y_ptr.dtype.element_ty), mask=known)


@triton.jit
def _silu_gradient(dy, value):
    sigmoid = tl.sigmoid(value)
    return dy * sigmoid * (1 + value * (1 - sigmoid))


@triton.jit
def _backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, sequence_ptr, offsets_ptr, dx_ptr, dweight_ptr,
    tokens, D, x_stride, dy_stride,
    W: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """dx, and this program's part of dweight and dbias: `[programs, W + 1, D]`, the last row dbias."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = (channel < D)[None, :]
    part = dweight_ptr + tl.program_id(1).to(tl.int64) * ((W + 1) * D) + channel
    slot = tl.arange(0, 8)  # W + 1 accumulators side by side: Triton has no lists that change in loops
    sums = tl.zeros([8, BLOCK], tl.float32)
    for offset in range(0, TOKENS, ROWS):
        token = tl.program_id(1).to(tl.int64) * TOKENS + offset + tl.arange(0, ROWS)
        sequence, start, end, real = _bounds(sequence_ptr, offsets_ptr, token, tokens)
        here = real[:, None] & known
        dx = tl.zeros([ROWS, BLOCK], tl.float32)
        for ahead in tl.static_range(W):
            later = token + ahead
            valid = (later < end)[:, None] & here
            at = dy_ptr + later[:, None] * dy_stride + channel[None, :]
            gradient = tl.load(at, mask=valid, other=0.0).to(tl.float32)
            if SILU:
                value = _before_activation(
                    x_ptr, weight_ptr, bias_ptr, initial_ptr, later, start, end, sequence, channel, x_stride,
                    D, here, W, HAS_BIAS, HAS_INITIAL,
                )  # fmt: skip
                gradient = _silu_gradient(gradient, value)
            weight = tl.load(weight_ptr + channel * W + (W - 1 - ahead), mask=channel < D, other=0.0)
            dx += weight.to(tl.float32)[None, :] * gradient
            if ahead == 0:
                for w in tl.static_range(W):
                    back = token - (W - 1 - w)
                    x = _input(x_ptr, initial_ptr, back, start, end, sequence, channel, x_stride, D, here, W,
                               HAS_INITIAL)  # fmt: skip
                    sums += tl.where(slot == w, 1.0, 0.0)[:, None] * tl.sum(gradient * x, axis=0)[None, :]
                sums += tl.where(slot == W, 1.0, 0.0)[:, None] * tl.sum(gradient, axis=0)[None, :]
        tl.store(dx_ptr + token[:, None] * D + channel[None, :], dx.to(dx_ptr.dtype.element_ty), mask=here)
    tl.store(part[None, :] + slot[:, None] * D, sums, mask=(slot <= W)[:, None] & known)


@triton.jit
def _initial_gradient_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, offsets_ptr, dinitial_ptr, D, x_stride, dy_stride,
    W: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradient of the initial states, which only the first W - 1 tokens see. Grid: (D / BLOCK, sequences)."""
    number = tl.program_id(1)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin, stop = tl.load(offsets_ptr + number), tl.load(offsets_ptr + number + 1)
    token = begin + tl.arange(0, ROWS)
    zero = token * 0
    sequence, start, end = zero + number, zero + begin, zero + stop
    here = ((token < stop) & (token < begin + W - 1))[:, None] & (channel < D)[None, :]
    gradient = tl.load(dy_ptr + token[:, None] * dy_stride + channel[None, :], mask=here, other=0.0).to(
        tl.float32
    )
    if SILU:
        value = _before_activation(
            x_ptr, weight_ptr, bias_ptr, initial_ptr, token, start, end, sequence, channel, x_stride, D, here,
            W, HAS_BIAS, True,
        )  # fmt: skip
        gradient = _silu_gradient(gradient, value)
    for place in tl.static_range(W - 1):
        w = place - (token - begin)  # the weight through which a token sees this place
        at = weight_ptr + channel[None, :] * W + w[:, None]
        weight = tl.load(at, mask=(w >= 0)[:, None] & here, other=0.0).to(tl.float32)
        out = dinitial_ptr + (number.to(tl.int64) * D + channel) * (W - 1) + place
        tl.store(out, tl.sum(weight * gradient, axis=0), mask=channel < D)


def conv_triton(x, weight, bias, activation, initial_state, cu_seqlens) -> Tensor:
    """`causal_conv1d` of `models/ops/conv.py` on these kernels, without the final state."""
    return _Convolution.apply(x, weight, bias, initial_state, cu_seqlens, activation == "silu")


def _sequences(x: Tensor, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sequence of every token of all rows, and the offsets of the sequences."""
    tokens = torch.arange(x.shape[0] * x.shape[1], device=x.device)
    if cu_seqlens is None:
        offsets = torch.arange(x.shape[0] + 1, device=x.device) * x.shape[1]
        return (tokens // x.shape[1]).to(torch.int32), offsets
    offsets = cu_seqlens.to(device=x.device, dtype=torch.long)
    return (torch.searchsorted(offsets, tokens, right=True) - 1).to(torch.int32), offsets


def _rows(t: Tensor) -> Tensor:
    """The tensor itself where a constant stride leads from token to token through all rows, else a copy."""
    if t.stride(2) == 1 and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)):
        return t
    return t.contiguous()


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, initial_state, cu_seqlens, silu):
        x, weight = _rows(x), weight.contiguous()
        initial_state = None if initial_state is None else initial_state.contiguous()
        sequence, offsets = _sequences(x, cu_seqlens)
        channels, width = weight.shape
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grid = (triton.cdiv(channels, FORWARD["BLOCK"]), triton.cdiv(sequence.numel(), FORWARD["ROWS"]))
        _forward_kernel[grid](
            x, weight, bias, initial_state, sequence, offsets, y, sequence.numel(), channels, x.stride(1),
            W=width, SILU=silu, HAS_BIAS=bias is not None, HAS_INITIAL=initial_state is not None, **FORWARD,
        )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, initial_state, sequence, offsets)
        ctx.silu = silu
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, initial_state, sequence, offsets = ctx.saved_tensors
        dy = _rows(dy)
        channels, width = weight.shape
        options = {"W": width, "SILU": ctx.silu, "HAS_BIAS": bias is not None}
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        programs = triton.cdiv(sequence.numel(), TOKENS_PER_PROGRAM)
        parts = torch.empty(programs, width + 1, channels, dtype=torch.float32, device=x.device)
        _backward_kernel[(triton.cdiv(channels, BACKWARD["BLOCK"]), programs)](
            dy, x, weight, bias, initial_state, sequence, offsets, dx, parts, sequence.numel(), channels,
            x.stride(1), dy.stride(1), TOKENS=TOKENS_PER_PROGRAM, HAS_INITIAL=initial_state is not None,
            **options, **BACKWARD,
        )  # fmt: skip
        parts = parts.sum(0)
        dinitial = None
        if initial_state is not None:
            dinitial = torch.empty_like(initial_state)
            _initial_gradient_kernel[(triton.cdiv(channels, 64), offsets.numel() - 1)](
                dy, x, weight, bias, initial_state, offsets, dinitial, channels, x.stride(1), dy.stride(1),
                ROWS=triton.next_power_of_2(width), BLOCK=64, **options,
            )  # fmt: skip
        dbias = None if bias is None else parts[width].to(bias.dtype)
        return dx, parts[:width].t().to(weight.dtype), dbias, dinitial, None, None
