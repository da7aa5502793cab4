"""Causal depthwise convolution over time, the short convolution in front of the SSD recurrence.

    y_t = activation(bias + sum_w weight[:, w] * x_{t - W + 1 + w})

Inputs before the first token come from `initial_state`, or are zero.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve
from .step import one_kernel


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Convolves every channel with its own W weights, looking only at the past.

    Args:
        x: inputs `[B, T, D]`, any strides.
        weight: `[D, W]`; the last column meets the current token.
        bias: `[D]`.
        activation: None or "silu".
        initial_state: the last W - 1 inputs before the first token `[S, D, W - 1]`, S = B, or the number of
            sequences when `cu_seqlens` is given.
        cu_seqlens: offsets `[S + 1]` of sequences packed in one row (B == 1): nothing leaks over an offset.
        backend: see `models/ops/backend.py`; None follows STATEX_BACKEND.

    Returns:
        y `[B, T, D]` in x's dtype, and the last W - 1 inputs `[S, D, W - 1]` (None unless asked for).

    Raises:
        ValueError: shapes that do not fit together, an unknown activation, or a backend that cannot run.
    """
    _check(x, weight, bias, activation, initial_state, cu_seqlens)
    carried = initial_state is not None and cu_seqlens is None and backend is None
    if carried and weight.shape[1] in (2, 3, 4) and one_kernel("conv_step", x, weight, initial_state):
        from .step_triton import conv_step

        y, final = conv_step(x, weight, bias, activation, initial_state)
        return y, final if output_final_state else None
    chosen = resolve("causal_conv1d", x.device, _offered(x, weight, initial_state, cu_seqlens), backend)
    run = {"torch": _conv_torch, "mamba_ssm": _conv_mamba, "triton": _conv_triton}[chosen]
    y = run(x, weight, bias, activation, initial_state, cu_seqlens)
    final = final_inputs(x, weight.shape[1], initial_state, cu_seqlens) if output_final_state else None
    return y, final


def final_inputs(x: Tensor, width: int, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """The last W - 1 inputs of every sequence `[S, D, W - 1]`, initial ones included where it is shorter."""
    batch, length, channels = x.shape
    if cu_seqlens is None:
        offsets = torch.arange(batch + 1, device=x.device) * length
    else:
        offsets = cu_seqlens.to(device=x.device, dtype=torch.long)
    tail = torch.arange(width - 1, device=x.device)
    tokens = offsets[1:, None] - (width - 1) + tail  # [S, W - 1]
    before = tokens < offsets[:-1, None]
    clamped = tokens.clamp_min(0)
    last = x[clamped // length, clamped % length]  # [S, W - 1, D]
    if initial_state is None:
        return last.masked_fill(before.unsqueeze(2), 0).transpose(1, 2)
    places = (tokens - offsets[:-1, None] + width - 1).clamp(0, max(width - 2, 0))
    first = initial_state.to(x.dtype).gather(2, places.unsqueeze(1).expand(-1, channels, -1))
    return torch.where(before.unsqueeze(1), first, last.transpose(1, 2))


def _conv_torch(x, weight, bias, activation, initial_state, cu_seqlens) -> Tensor:
    width = weight.shape[1]
    padded, token_rows = _with_past(x, width, initial_state, cu_seqlens)
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    inputs, weight = padded.to(dtype), weight.to(dtype)
    places = padded.shape[1] - width + 1
    # W shifted products: on a CPU as fast as a grouped convolution, and without its transposes
    y = sum(inputs[:, w : w + places] * weight[:, w] for w in range(width))
    if token_rows is not None:
        y = y[:, token_rows - (width - 1)]
    if bias is not None:
        y = y + bias.to(dtype)
    return (F.silu(y) if activation == "silu" else y).to(x.dtype)


def _with_past(x, width, initial_state, cu_seqlens) -> tuple[Tensor, Tensor | None]:
    """Inputs with W - 1 past rows before every sequence, and the tokens' rows (None: all others)."""
    batch, length, channels = x.shape
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    if initial_state is None:
        past = x.new_zeros(sequences, width - 1, channels)
    else:
        past = initial_state.to(x.dtype).transpose(1, 2)
    if cu_seqlens is None:
        return torch.cat([past, x], dim=1), None
    tail = torch.arange(width - 1, device=x.device)
    ends = cu_seqlens.to(device=x.device, dtype=torch.long)
    order = torch.arange(sequences, device=x.device) * (width - 1)
    sequence = torch.searchsorted(
        ends, torch.arange(length, device=x.device), right=True
    )  # 1 in the first sequence
    token_rows = torch.arange(length, device=x.device) + sequence * (width - 1)
    past_rows = (ends[:-1] + order)[:, None] + tail
    rows = x.new_zeros(length + sequences * (width - 1), channels)
    rows = rows.index_copy(0, token_rows, x[0]).index_copy(0, past_rows.flatten(), past.flatten(0, 1))
    return rows.unsqueeze(0), token_rows


def _conv_triton(x, weight, bias, activation, initial_state, cu_seqlens) -> Tensor:
    from .conv_triton import conv_triton

    return conv_triton(x, weight, bias, activation, initial_state, cu_seqlens)


def _conv_mamba(x, weight, bias, activation, initial_state, cu_seqlens) -> Tensor:
    function = importlib.import_module("causal_conv1d").causal_conv1d_fn
    sequence_index = None
    if cu_seqlens is not None:
        tokens = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
        offsets = cu_seqlens.to(device=x.device, dtype=torch.int32)
        sequence_index = (torch.searchsorted(offsets, tokens, right=True, out_int32=True) - 1).unsqueeze(0)
    if initial_state is not None:  # the kernel wants channels last, as x is
        initial_state = initial_state.to(x.dtype).transpose(1, 2).contiguous().transpose(1, 2)
    y = function(x.transpose(1, 2), weight, bias, sequence_index, initial_state, activation=activation)
    return y.transpose(1, 2)


def _offered(x, weight, initial_state, cu_seqlens) -> tuple[str, ...]:
    """Implementations that take these inputs, best first."""
    if x.dtype == torch.float64 or x.device.type != "cuda":
        return ("torch",)
    offered = ("triton", "torch") if weight.shape[1] in (2, 3, 4) else ("torch",)
    # the package has no initial state for each of several packed sequences
    aligned = x.stride(2) == 1 and x.stride(1) % 8 == 0 and x.shape[2] % 8 == 0
    packed_state = cu_seqlens is not None and initial_state is not None
    return (
        (offered[0], "mamba_ssm", "torch")
        if "triton" in offered and aligned and not packed_state
        else offered
    )


def _check(x, weight, bias, activation, initial_state, cu_seqlens) -> None:
    batch, _, channels = x.shape
    width = weight.shape[-1]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = {
        "weight": (weight, (channels, width)),
        "bias": (bias, (channels,)),
        "initial_state": (initial_state, (sequences, channels, width - 1)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation {activation!r} is unknown; use None or 'silu'")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"causal_conv1d: cu_seqlens packs sequences in one row, but x has {batch} rows")
