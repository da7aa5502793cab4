"""One token at a time: the decoding steps of GLA, SSD and the convolution in front of it, one kernel each.

Their twins are `gla_recurrent`, `ssd_recurrent` and the torch path of `causal_conv1d`, which need ten to
fifteen kernels for a step. A state is read once and written once, see `step.states_in_place`. No gradients.

Shapes: B rows with one token each, H heads, K key and V value channels, P head channels, N state channels,
G groups, D channels of the convolution, W its width.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/step_triton.py needs triton") from error

from .step import new_state

_TILE = 4096  # numbers of a state that a program holds at once
_PROGRAMS = 128  # about as many as an H100 has multiprocessors


@triton.jit
def _gla_step_kernel(
    q_ptr, k_ptr, v_ptr, gate_ptr, state_ptr, o_ptr, new_ptr, scale, normalizer, clamp_min,
    H, K, V, q_row, k_row, v_row, gate_row,
    HAS_STATE: tl.constexpr, HAS_CLAMP: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid: (V / BV, B * H)."""
    number = tl.program_id(1).to(tl.int64)
    row, head = number // H, number % H
    column = tl.program_id(0) * BV + tl.arange(0, BV)
    inside = column < V
    v = tl.load(v_ptr + row * v_row + head * V + column, mask=inside, other=0.0).to(tl.float32)
    o = tl.zeros([BV], tl.float32)
    for start in range(0, K, BK):
        key = start + tl.arange(0, BK)
        known = key < K
        q = tl.load(q_ptr + row * q_row + head * K + key, mask=known, other=0.0).to(tl.float32) * scale
        k = tl.load(k_ptr + row * k_row + head * K + key, mask=known, other=0.0).to(tl.float32)
        state = k[:, None] * v[None, :]
        at = number * K * V + key[:, None] * V + column[None, :]
        mask = known[:, None] & inside[None, :]
        if HAS_STATE:
            logit = tl.load(gate_ptr + row * gate_row + head * K + key, mask=known, other=0.0).to(tl.float32)
            log_decay = (tl.minimum(logit, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(logit)))) / normalizer
            if HAS_CLAMP:
                log_decay = tl.maximum(log_decay, clamp_min)
            before = tl.load(state_ptr + at, mask=mask, other=0.0)
            state += tl.exp(log_decay)[:, None] * before
        tl.store(new_ptr + at, state, mask=mask)
        o += tl.sum(q[:, None] * state, axis=0)
    tl.store(o_ptr + number * V + column, o.to(o_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _ssd_step_kernel(
    x_ptr, dt_ptr, a_ptr, b_ptr, c_ptr, d_ptr, state_ptr, y_ptr, new_ptr,
    H, P, N, heads_per_group, x_row, dt_row, b_row, c_row,
    HAS_STATE: tl.constexpr, HAS_D: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Grid: (P / BP, B * H)."""
    number = tl.program_id(1).to(tl.int64)
    row, head = number // H, number % H
    p = tl.program_id(0) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    of_group = (head // heads_per_group) * N + n
    x = tl.load(x_ptr + row * x_row + head * P + p, mask=p < P, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * b_row + of_group, mask=n < N, other=0.0).to(tl.float32)
    c = tl.load(c_ptr + row * c_row + of_group, mask=n < N, other=0.0).to(tl.float32)
    dt = tl.load(dt_ptr + row * dt_row + head).to(tl.float32)
    state = (dt * x)[:, None] * b[None, :]
    at = number * P * N + p[:, None] * N + n[None, :]
    mask = (p < P)[:, None] & (n < N)[None, :]
    if HAS_STATE:
        decay = tl.exp(dt * tl.load(a_ptr + head).to(tl.float32))
        state += decay * tl.load(state_ptr + at, mask=mask, other=0.0)
    tl.store(new_ptr + at, state, mask=mask)
    y = tl.sum(state * c[None, :], axis=1)
    if HAS_D:
        y += tl.load(d_ptr + head).to(tl.float32) * x
    tl.store(y_ptr + number * P + p, y.to(y_ptr.dtype.element_ty), mask=p < P)


@triton.jit
def _conv_step_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, y_ptr, new_ptr, D, x_row,
    W: tl.constexpr, HAS_BIAS: tl.constexpr, SILU: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: (D / BLOCK, B)."""
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = channel < D
    x = tl.load(x_ptr + row * x_row + channel, mask=known, other=0.0)
    last = (row * D + channel) * (W - 1) + W - 2  # the input before this one, at the end of the state
    weight = weight_ptr + channel * W + W - 1
    y = x.to(tl.float32) * tl.load(weight, mask=known, other=0.0).to(tl.float32)
    x1 = tl.load(state_ptr + last, mask=known, other=0.0)
    y += x1.to(tl.float32) * tl.load(weight - 1, mask=known, other=0.0).to(tl.float32)
    if W > 2:
        x2 = tl.load(state_ptr + last - 1, mask=known, other=0.0)
        y += x2.to(tl.float32) * tl.load(weight - 2, mask=known, other=0.0).to(tl.float32)
    if W > 3:
        x3 = tl.load(state_ptr + last - 2, mask=known, other=0.0)
        y += x3.to(tl.float32) * tl.load(weight - 3, mask=known, other=0.0).to(tl.float32)
    tl.debug_barrier()  # the new state may lie where the old one was: all of it has been read now
    tl.store(new_ptr + last, x.to(new_ptr.dtype.element_ty), mask=known)
    if W > 2:
        tl.store(new_ptr + last - 1, x1.to(new_ptr.dtype.element_ty), mask=known)
    if W > 3:
        tl.store(new_ptr + last - 2, x2.to(new_ptr.dtype.element_ty), mask=known)
    if HAS_BIAS:
        y += tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + row * D + channel, y.to(y_ptr.dtype.element_ty), mask=known)


def gla_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    gate_logit_normalizer: float,
    clamp_min: float | None,
    scale: float,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`gla_gated` of one token: q, k and logits [B, 1, H, K], v [B, 1, H, V], state [B, H, K, V]."""
    B, _, H, K = q.shape
    V = v.shape[-1]
    o, state = v.new_empty(B, 1, H, V), new_state(v, (B, H, K, V), torch.float32, initial_state)
    initial_state = None if initial_state is None else initial_state.contiguous()
    q, k, v, gate = (_rows(x) for x in (q, k, v, gate))
    # narrow columns where there are few heads, so that every multiprocessor has some
    BV = next((n for n in (64, 32) if triton.cdiv(V, n) * B * H >= _PROGRAMS), 16)
    BK = min(triton.next_power_of_2(K), _TILE // BV)
    _gla_step_kernel[(triton.cdiv(V, BV), B * H)](
        q, k, v, gate, initial_state, o, state, scale, float(gate_logit_normalizer), clamp_min or 0.0,
        H, K, V, q.stride(0), k.stride(0), v.stride(0), gate.stride(0),
        HAS_STATE=initial_state is not None, HAS_CLAMP=clamp_min is not None, BK=BK, BV=BV, num_warps=8,
    )  # fmt: skip
    return o, state


def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, *, D: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`ssd` of one token: x [B, 1, H, P], dt [B, 1, H], B and C [B, 1, G, N], state [B, H, P, N]."""
    batch, _, H, P = x.shape
    G, N = B.shape[2:]
    y, state = x.new_empty(batch, 1, H, P), new_state(x, (batch, H, P, N), torch.float32, initial_state)
    initial_state = None if initial_state is None else initial_state.contiguous()
    x, dt, B, C = (_rows(t) for t in (x, dt, B, C))
    BN = triton.next_power_of_2(N)
    BP = max(1, min(triton.next_power_of_2(P), _TILE // BN))
    _ssd_step_kernel[(triton.cdiv(P, BP), batch * H)](
        x, dt, A, B, C, D, initial_state, y, state,
        H, P, N, H // G, x.stride(0), dt.stride(0), B.stride(0), C.stride(0),
        HAS_STATE=initial_state is not None, HAS_D=D is not None, BP=BP, BN=BN,
    )  # fmt: skip
    return y, state


def conv_step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` of one token: x [B, 1, D], weight [D, W], W 2, 3 or 4, initial_state [B, D, W - 1]."""
    batch, _, D = x.shape
    y, state = x.new_empty(batch, 1, D), new_state(x, initial_state.shape, x.dtype, initial_state)
    rows = _rows(x)
    _conv_step_kernel[(triton.cdiv(D, 128), batch)](
        rows, weight.contiguous(), bias, initial_state.contiguous(), y, state, D, rows.stride(0),
        W=weight.shape[1], HAS_BIAS=bias is not None, SILU=activation == "silu", BLOCK=128,
    )  # fmt: skip
    return y, state


def _rows(t: Tensor) -> Tensor:
    """[B, 1, ...] as [B, channels], a view wherever the channels lie side by side."""
    t = t.reshape(t.shape[0], -1)
    return t if t.stride(1) == 1 else t.contiguous()
