"""Triton kernels that quantise matrices for `matmul.py`: one read from memory, one write."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/matmul_triton.py needs triton") from error

from .matmul import FORMAT, LARGEST, MOST_PARTS, SMALLEST_AMAX

_TILE = 64  # side of a transposed tile


@triton.jit
def _row_amax(x_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    amax = tl.zeros([BLOCK], dtype=tl.float32)
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        amax = tl.maximum(amax, tl.abs(tl.load(x_ptr + at, mask=at < WIDTH, other=0.0).to(tl.float32)))
    return tl.max(amax, axis=0)


@triton.jit
def _cast_row(x_ptr, y_ptr, factor, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(0, WIDTH, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        tl.store(y_ptr + at, (x * factor).to(y_ptr.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def _quantise_rows(
    a_ptr, b_ptr, c_ptr, d_ptr, y_ptr, scale_ptr, a_stride, b_stride, c_stride, d_stride,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    LARGEST: tl.constexpr, SMALLEST_AMAX: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program has one row of every part; a part that is absent has width 0. The second read hits the cache.

    A NaN that `maximum` drops from the scale stays in the values, an infinity makes the factor 0 and itself
    NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    a, b, c, d = (
        a_ptr + row * a_stride,
        b_ptr + row * b_stride,
        c_ptr + row * c_stride,
        d_ptr + row * d_stride,
    )
    first = tl.maximum(_row_amax(a, A, BLOCK), _row_amax(b, B, BLOCK))
    second = tl.maximum(_row_amax(c, C, BLOCK), _row_amax(d, D, BLOCK))
    amax = tl.maximum(tl.maximum(first, second), SMALLEST_AMAX)
    factor = LARGEST / amax
    y = y_ptr + row * (A + B + C + D)
    _cast_row(a, y, factor, A, BLOCK)
    _cast_row(b, y + A, factor, B, BLOCK)
    _cast_row(c, y + A + B, factor, C, BLOCK)
    _cast_row(d, y + A + B + C, factor, D, BLOCK)
    tl.store(scale_ptr + row, amax / LARGEST)


@triton.jit
def _cast_transposed(
    x_ptr, amax_ptr, y_ptr, rows, columns, y_stride, LARGEST: tl.constexpr, TILE: tl.constexpr
):
    """`y[c, r] = x[r, c] * LARGEST / amax[c]`, one tile."""
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    column = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    x = tl.load(x_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0).to(tl.float32)
    factor = LARGEST / tl.load(amax_ptr + column, mask=column < columns, other=1.0)
    y = (x * factor[None, :]).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + column[:, None] * y_stride + row[None, :], tl.trans(y), mask=tl.trans(inside))


def quantise_rows_kernel(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """See `quantise_rows`. Returns values `[rows, D_1 + D_2 + ...]` and scale `[rows, 1]`."""
    rows, device = len(parts[0]), parts[0].device
    widths = [part.shape[1] for part in parts] + [0] * (MOST_PARTS - len(parts))
    pointers = parts + [parts[0]] * (MOST_PARTS - len(parts))
    values = torch.empty(rows, sum(widths), dtype=FORMAT, device=device)
    scale = torch.empty(rows, 1, dtype=torch.float32, device=device)
    block = min(2048, triton.next_power_of_2(max(widths)))
    _quantise_rows[(rows,)](
        *pointers, values, scale, *(part.stride(0) for part in pointers), *widths,
        LARGEST=LARGEST, SMALLEST_AMAX=SMALLEST_AMAX, BLOCK=block, num_warps=4,
    )  # fmt: skip
    return values, scale


def quantise_columns_kernel(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """See `quantise_columns`. Returns values `[D, rows_1 + rows_2 + ...]` and scale `[D, 1]`."""
    columns, rows = parts[0].shape[1], [len(part) for part in parts]
    largest = [torch.linalg.vector_norm(part, float("inf"), dim=0, dtype=torch.float32) for part in parts]
    amax = torch.stack(largest).amax(0).clamp_(min=SMALLEST_AMAX)  # [D]
    values = torch.empty(columns, sum(rows), dtype=FORMAT, device=parts[0].device)
    done = 0
    for part, count in zip(parts, rows, strict=True):
        grid = (triton.cdiv(count, _TILE), triton.cdiv(columns, _TILE))
        _cast_transposed[grid](
            part, amax, values[:, done:], count, columns, values.stride(0), LARGEST=LARGEST, TILE=_TILE
        )
        done += count
    return values, (amax / LARGEST).unsqueeze(1)
