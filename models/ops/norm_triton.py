"""One pair of Triton kernels for every RMS norm of `norm.py`.

Rows are tokens x groups; a program holds a tile of whole rows. Gate and input may be slices of a wider
projection: only the channel axis must be contiguous. The backward recomputes everything from the input and
the reciprocal root mean square.
"""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/norm_triton.py needs triton") from error

_TILE = 4096  # elements a program of the forward kernel holds at once
# measured on an H200: what a program of the backward kernel holds, without a gate and with one, and how many
# programs share the rows; as many partial weight gradients
_BACKWARD_TILE, _GATED_BACKWARD_TILE = 8192, 2048
_MAX_BACKWARD_PROGRAMS = 2112


@triton.jit
def _rms_norm_forward(
    x_ptr, residual_ptr, gate_ptr, weight_ptr, y_ptr, total_ptr, rstd_ptr,
    tokens, x_stride, residual_stride, gate_stride, eps,
    G: tl.constexpr, D: tl.constexpr, WEIGHT_PER_GROUP: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    HAS_GATE: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    inside = (rows < tokens)[:, None] & (columns < D)[None, :]
    channel = group * D + columns[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + rows[:, None] * residual_stride + channel, mask=inside, other=0.0).to(
            tl.float32
        )
        x = x.to(total_ptr.dtype.element_ty).to(tl.float32)
        tl.store(total_ptr + rows[:, None] * (G * D) + channel, x, mask=inside)
    if HAS_GATE:
        z = tl.load(gate_ptr + rows[:, None] * gate_stride + channel, mask=inside, other=0.0).to(tl.float32)
        act = z * tl.sigmoid(z)
        if not NORM_BEFORE_GATE:
            x *= act
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    weight_at = group * D + columns if WEIGHT_PER_GROUP else columns
    weight = tl.load(weight_ptr + weight_at, mask=columns < D, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    if HAS_GATE and NORM_BEFORE_GATE:
        y *= act
    tl.store(y_ptr + rows[:, None] * (G * D) + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + rows * G + group, rstd, mask=rows < tokens)


@triton.jit
def _rms_norm_backward(
    dy_ptr, dtotal_ptr, x_ptr, gate_ptr, weight_ptr, rstd_ptr, dx_ptr, dgate_ptr, dweight_ptr, y_ptr,
    tokens, tokens_per_program, dy_stride, dtotal_stride, x_stride, gate_stride, dgate_stride,
    G: tl.constexpr, D: tl.constexpr, WEIGHT_PER_GROUP: tl.constexpr, HAS_DTOTAL: tl.constexpr,
    HAS_GATE: tl.constexpr, NORM_BEFORE_GATE: tl.constexpr, HAS_Y: tl.constexpr,
    NORMED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx, dgate and each program's part of dweight; with HAS_Y the norm's output once more, while its inputs
    are at hand. NORMED: x was divided by its root mean square already (no gate). Grid: (programs, G).
    """
    program = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    columns = tl.arange(0, BLOCK)
    channel = group * D + columns[None, :]
    weight_at = group * D + columns if WEIGHT_PER_GROUP else columns
    weight = tl.load(weight_ptr + weight_at, mask=columns < D, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([BLOCK], dtype=tl.float32)
    first = program * tokens_per_program
    last = tl.minimum(first + tokens_per_program, tokens)
    for start in range(first, last, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < last)[:, None] & (columns < D)[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + channel, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows[:, None] * dy_stride + channel, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows * G + group, mask=rows < last, other=0.0)[:, None]
        if HAS_GATE:
            z = tl.load(gate_ptr + rows[:, None] * gate_stride + channel, mask=inside, other=0.0).to(
                tl.float32
            )
            sigma = tl.sigmoid(z)
            act = z * sigma
            dact_dz = sigma * (1.0 + z * (1.0 - sigma))
        if HAS_GATE and NORM_BEFORE_GATE:
            xhat = x * rstd
            dgate = dy * xhat * weight * dact_dz
            dnorm = dy * act
        elif HAS_GATE:
            xhat = x * act * rstd
            dnorm = dy
        else:
            xhat = x if NORMED else x * rstd
            dnorm = dy
        dweight += tl.sum(dnorm * xhat, axis=0)
        dxhat = dnorm * weight
        dx = (dxhat - xhat * (tl.sum(dxhat * xhat, axis=1) / D)[:, None]) * rstd
        if HAS_GATE and not NORM_BEFORE_GATE:
            dgate = dx * x * dact_dz
            dx *= act
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + rows[:, None] * dtotal_stride + channel, mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(dx_ptr + rows[:, None] * (G * D) + channel, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if HAS_GATE:
            out = dgate.to(dgate_ptr.dtype.element_ty)
            tl.store(dgate_ptr + rows[:, None] * dgate_stride + channel, out, mask=inside)
        if HAS_Y:
            y = xhat * weight
            if HAS_GATE and NORM_BEFORE_GATE:
                y *= act
            tl.store(y_ptr + rows[:, None] * (G * D) + channel, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + (program * G + group) * D + columns, dweight, mask=columns < D)


def rows_of(x: Tensor) -> Tensor:
    """`[..., C]` as `[tokens, C]`, a view whenever the channels are contiguous and the rows evenly spaced."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _tile(row: int, elements: int) -> tuple[int, int, int]:
    """Rows of a tile, elements of a row, and warps: at least two, 32 elements a thread."""
    block = triton.next_power_of_2(row)
    rows = max(1, min(16, elements // block))
    return rows, block, min(8, max(2, rows * block // 1024))


def norm_forward(x, weight, eps, residual, gate, norm_before_gate, groups, out_dtype=None):
    """Runs the forward kernel. Returns y `[tokens, C]`, x + residual, rstd `[tokens, G]`."""
    x = rows_of(x)
    tokens, channels = x.shape
    row = channels // groups
    y = torch.empty(tokens, channels, dtype=out_dtype or x.dtype, device=x.device)
    total = x if residual is None else torch.empty(tokens, channels, dtype=residual.dtype, device=x.device)
    rstd = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    residual = None if residual is None else rows_of(residual)
    gate = None if gate is None else rows_of(gate)
    rows, block, warps = _tile(row, _TILE)
    _rms_norm_forward[(triton.cdiv(tokens, rows), groups)](
        x, residual, gate, weight, y, total, rstd,
        tokens, x.stride(0), _stride(residual), _stride(gate), eps,
        G=groups, D=row, WEIGHT_PER_GROUP=weight.numel() != row, HAS_RESIDUAL=residual is not None,
        HAS_GATE=gate is not None, NORM_BEFORE_GATE=norm_before_gate, ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return y, total, rstd


def norm_backward(
    dy,
    dtotal,
    x,
    gate,
    weight,
    rstd,
    norm_before_gate,
    groups,
    dx_dtype,
    *,
    dgate=None,
    y_dtype=None,
    normed=False,
):
    """Runs the backward kernel on rows `[tokens, C]`.

    Args:
        dgate: where to put the gate's gradient, rows of any stride; None makes a tensor.
        y_dtype: also form the norm's output again, in this dtype.
        normed: x was divided by its root mean square already.

    Returns:
        dx, dgate (or None), dweight in fp32, and the norm's output (or None).
    """
    tokens, channels = x.shape
    row = channels // groups
    dy = rows_of(dy)
    dtotal = None if dtotal is None else rows_of(dtotal)
    gate = None if gate is None else rows_of(gate)
    rows, block, warps = _tile(row, _BACKWARD_TILE if gate is None else _GATED_BACKWARD_TILE)
    per_program = triton.cdiv(triton.cdiv(tokens, max(1, _MAX_BACKWARD_PROGRAMS // groups)), rows) * rows
    programs = triton.cdiv(tokens, per_program)
    dx = torch.empty(tokens, channels, dtype=dx_dtype, device=x.device)
    if gate is not None and dgate is None:
        dgate = torch.empty(tokens, channels, dtype=gate.dtype, device=x.device)
    y = None if y_dtype is None else torch.empty(tokens, channels, dtype=y_dtype, device=x.device)
    dweight = torch.empty(programs, groups, row, dtype=torch.float32, device=x.device)
    _rms_norm_backward[(programs, groups)](
        dy, dtotal, x, gate, weight, rstd, dx, dgate, dweight, y, tokens, per_program,
        dy.stride(0), _stride(dtotal), x.stride(0), _stride(gate), _stride(dgate),
        G=groups, D=row, WEIGHT_PER_GROUP=weight.numel() != row, HAS_DTOTAL=dtotal is not None,
        HAS_GATE=gate is not None, NORM_BEFORE_GATE=norm_before_gate, HAS_Y=y is not None, NORMED=normed,
        ROWS=rows, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    dweight = dweight.sum(0)  # [G, D]
    return dx, dgate, dweight.view(-1) if weight.numel() != row else dweight.sum(0), y


class _FusedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, gate, weight, eps, norm_before_gate, groups):
        y, total, rstd = norm_forward(x, weight, eps, residual, gate, norm_before_gate, groups)
        ctx.save_for_backward(total, gate, weight, rstd)
        ctx.options = norm_before_gate, groups, x.dtype, x.shape
        ctx.has_residual = residual is not None
        ctx.residual_dtype = None if residual is None else residual.dtype
        if residual is None:
            return y.view(x.shape), None
        return y.view(x.shape), total.view(x.shape)

    @staticmethod
    def backward(ctx, dy, dtotal):
        total, gate, weight, rstd = ctx.saved_tensors
        norm_before_gate, groups, x_dtype, shape = ctx.options
        dx, dgate, dweight, _ = norm_backward(
            dy, dtotal if ctx.has_residual else None, total, gate, weight, rstd, norm_before_gate, groups,
            ctx.residual_dtype or x_dtype,
        )  # fmt: skip
        dx = dx.view(shape)
        dgate = None if dgate is None else dgate.view(gate.shape)
        dresidual = dx if ctx.has_residual else None
        return dx.to(x_dtype), dresidual, dgate, dweight.view(weight.shape).to(weight.dtype), None, None, None


def fused_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    gate: Tensor | None = None,
    norm_before_gate: bool = True,
    groups: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """The norms of `norm.py` in one pass over memory. Returns (y, x + residual or None)."""
    return _FusedNorm.apply(x, residual, gate, weight.contiguous(), eps, norm_before_gate, groups)
