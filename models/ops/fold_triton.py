"""A norm's weight multiplied into the columns of the matrix behind it, and the way back, one pass each."""

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/fold_triton.py needs triton") from error

_ROWS, _COLUMNS = 16, 256  # of a tile
_ROWS_A_PROGRAM = 256  # of the way back: as many share one partial sum


@triton.jit
def _fold_kernel(
    matrix_ptr, norm_ptr, folded_ptr, R, D, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """folded = matrix * norm, rounded once. Grid: (R / ROWS, D / COLUMNS)."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < R) & (column < D)[None, :]
    norm = tl.load(norm_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    matrix = tl.load(matrix_ptr + row * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
    folded = (matrix * norm[None, :]).to(folded_ptr.dtype.element_ty)
    tl.store(folded_ptr + row * D + column[None, :], folded, mask=inside)


@triton.jit
def _unfold_kernel(
    gradient_ptr, matrix_ptr, norm_ptr, dnorm_ptr, R, D, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SHARE: tl.constexpr,
):  # fmt: skip
    """gradient *= norm in place; this program's part of sum over rows of gradient * matrix [R / SHARE, D].

    Grid: (R / SHARE, D / COLUMNS).
    """
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    norm = tl.load(norm_ptr + column, mask=column < D, other=0.0).to(tl.float32)
    total = tl.zeros([COLUMNS], tl.float32)
    for start in range(0, SHARE, ROWS):
        row = (tl.program_id(0).to(tl.int64) * SHARE + start + tl.arange(0, ROWS))[:, None]
        inside = (row < R) & (column < D)[None, :]
        matrix = tl.load(matrix_ptr + row * stride + column[None, :], mask=inside, other=0.0).to(tl.float32)
        at = gradient_ptr + row * D + column[None, :]
        gradient = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(gradient * matrix, axis=0)
        tl.store(at, (gradient * norm[None, :]).to(gradient_ptr.dtype.element_ty), mask=inside)
    tl.store(dnorm_ptr + tl.program_id(0) * D + column, total, mask=column < D)


def fold(matrix: Tensor, norm: Tensor, dtype: torch.dtype) -> Tensor:
    """`matrix [R, D] * norm [D]` in `dtype`."""
    rows, columns = matrix.shape
    folded = torch.empty(rows, columns, dtype=dtype, device=matrix.device)
    _fold_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns, _COLUMNS))](
        matrix, norm, folded, rows, columns, matrix.stride(0), ROWS=_ROWS, COLUMNS=_COLUMNS
    )
    return folded


def unfold(gradient: Tensor, matrix: Tensor, norm: Tensor) -> Tensor:
    """Turns the gradient `[R, D]` of the folded matrix into the matrix's own, in place; returns norm's."""
    rows, columns = matrix.shape
    shares = triton.cdiv(rows, _ROWS_A_PROGRAM)
    dnorm = torch.empty(shares, columns, dtype=torch.float32, device=matrix.device)
    _unfold_kernel[(shares, triton.cdiv(columns, _COLUMNS))](
        gradient, matrix, norm, dnorm, rows, columns, matrix.stride(0),
        ROWS=_ROWS, COLUMNS=_COLUMNS, SHARE=_ROWS_A_PROGRAM,
    )  # fmt: skip
    return dnorm.sum(0)
