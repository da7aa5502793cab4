"""The matrix products of the fused linear maps: one forward, two of the backward pass, in bf16 or in fp8.

Tokens are rows: `hidden [tokens, D_in]`, `dy [tokens, D_out]`, `weight [D_out, D_in]`. `set_products("fp8")`
turns two of the three into float8 products (`torch._scaled_mm`):

| product         | computes                            | scales, left | scales, right        |
| --------------- | ----------------------------------- | ------------ | -------------------- |
| output          | `hidden @ W.T`                      | one a token  | one a row of W       |
| input gradient  | `[dy_1 dy_2 ...] @ [W_1; W_2; ...]` | one a token  | one a column of W    |
| weight gradient | `dy.T @ hidden`                     |              | stays as it is: bf16 |

A scale maps the largest entry of its row to the largest float8. With a scale for each token the range of e4m3
(15 binades of normal numbers, 3 bits of mantissa) serves for gradients as well; e5m2 would double their
rounding error. Both factors rounded, a product has a relative error of 3.7 % by norm. The weight gradient
stays in bf16: its factors would have to be read once more and transposed, which costs much of the gain, and
the optimiser's moments add up what it loses. Products with a side that is below 1024, or that 16 does not
divide, stay in bf16 too.

The number format: arXiv 2209.05433, table 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import import_problem, setting

PRODUCTS = ("bf16", "fp8")
FORMAT = torch.float8_e4m3fn
LARGEST = 448.0  # of FORMAT
SMALLEST_AMAX = 1e-30  # where a row is smaller, zeros above all, this stands in for its largest entry
MOST_PARTS = 4  # matrices that one kernel joins
_CAPABILITY = (8, 9)  # the first NVIDIA GPUs that multiply float8
_SMALLEST_SIDE = 1024  # narrower products gain less than their factors' casts cost
_chosen = "bf16"


class Scaled(NamedTuple):
    """A quantised matrix: `values * scale` is what was quantised."""

    values: Tensor  # [rows, columns] FORMAT, contiguous
    scale: Tensor  # [rows, 1] fp32


def set_products(name: str) -> None:
    """Choose the number format of the fused linear maps' products in this process; `bf16` at the start.

    Raises:
        ValueError: an unknown name, or fp8 where it cannot run.
    """
    global _chosen
    if name not in PRODUCTS:
        raise ValueError(f"products {name!r} are unknown; use one of {', '.join(PRODUCTS)}")
    if name == "fp8" and (problem := fp8_problem()):
        raise ValueError(f"fp8 products: {problem}")
    _chosen = name


def products() -> str:
    """What `set_products` chose."""
    return _chosen


def fp8_problem() -> str | None:
    """None where fp8 products can run (a machine without GPU runs the torch twin), else what is missing."""
    if setting() == "torch":
        return (
            "STATEX_BACKEND=torch leaves out the fused linear maps that these products are part of; unset it"
        )
    if not torch.cuda.is_available():
        return None
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < _CAPABILITY:
            name, (major, minor) = torch.cuda.get_device_name(index), capability
            return (
                f"{name} has compute capability {major}.{minor}, and float8 needs 8.9 or more (Ada, Hopper)"
            )
    return import_problem("triton")


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias + residual`: `[tokens, D_out]` in the residual's dtype, else in
    hidden's."""
    if _in_fp8(hidden, weight):
        return _product_fp8(hidden, weight, bias, residual)
    weight = weight.to(hidden.dtype)
    if residual is None:
        return torch.nn.functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))
    if residual.dtype == hidden.dtype:
        y = torch.addmm(residual, hidden, weight.T)
    elif hidden.is_cuda:
        y = torch.addmm(residual, hidden, weight.T, out_dtype=residual.dtype)
    else:
        y = residual + (hidden @ weight.T).to(residual.dtype)
    return y if bias is None else y.add_(bias)


def weight_gradient(dy: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    """`dy.T @ hidden` in the weight's dtype; for fp32 weights without rounding to the compute dtype on the
    way."""
    if weight.dtype == hidden.dtype or not hidden.is_cuda:
        return (dy.T @ hidden).to(weight.dtype)
    return torch.mm(dy.T, hidden, out_dtype=weight.dtype)


def input_gradient(dys: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Sum of `dy_i @ W_i`, accumulated by the products themselves."""
    pairs = list(zip(dys, weights, strict=True))
    wide = [pair for pair in pairs if _in_fp8(*pair)]
    if wide:
        total = _input_gradient_fp8(*zip(*wide, strict=True))
        rest = [pair for pair in pairs if not _in_fp8(*pair)]
    else:
        total, rest = dys[0] @ weights[0].to(dys[0].dtype), pairs[1:]
    for dy, weight in rest:
        total.addmm_(dy, weight.to(dy.dtype))
    return total


def bias_gradient(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    """Sum of dy over the tokens in the bias's dtype, formed in fp32."""
    return None if bias is None else dy.sum(0, dtype=torch.float32).to(bias.dtype)


def _in_fp8(rows: Tensor, weight: Tensor) -> bool:
    """Whether the product of some tokens with a weight runs in fp8."""
    if _chosen == "bf16" or rows.dtype != torch.bfloat16:
        return False
    return all(side >= _SMALLEST_SIDE and side % 16 == 0 for side in (len(rows), *weight.shape))


def _product_fp8(hidden: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    y = scaled_product(_quantised_once(hidden), quantise_rows([weight]), fast=True)
    if bias is not None:
        y.add_(bias)
    if residual is None:
        return y
    return y.add_(residual) if residual.dtype == y.dtype else residual + y


def _input_gradient_fp8(dys: tuple[Tensor, ...], weights: tuple[Tensor, ...]) -> Tensor:
    total = None  # the sum is formed inside one product, in fp32, as far as parts can be joined
    for start in range(0, len(dys), MOST_PARTS):
        left = quantise_rows(dys[start : start + MOST_PARTS])
        part = scaled_product(left, quantise_columns(weights[start : start + MOST_PARTS]), fast=False)
        total = part if total is None else total.add_(part)
    return total


def _quantised_once(hidden: Tensor) -> Scaled:
    """Several products share one input: its quantised form stays on the tensor, and goes with it."""
    version = None if hidden.is_inference() else hidden._version  # counts in-place changes
    kept = getattr(hidden, "_statex_fp8", None)
    if kept is None or kept[0] != version:
        kept = hidden._statex_fp8 = version, quantise_rows([hidden])
    return kept[1]


def quantise_rows(parts: list[Tensor] | tuple[Tensor, ...]) -> Scaled:
    """Matrices side by side, `[rows, D_1 + D_2 + ...]`, each row of all of them with one scale.

    Args:
        parts: up to MOST_PARTS matrices `[rows, D_i]`, bf16 or fp32.

    Returns:
        values and scales; a row with a NaN or an infinity becomes NaN in every product.
    """
    parts = [part if part.stride(-1) == 1 else part.contiguous() for part in parts]
    if parts[0].is_cuda:
        from .matmul_triton import quantise_rows_kernel

        return Scaled(*quantise_rows_kernel(parts))
    return quantise_rows_plain(parts)


def quantise_columns(parts: list[Tensor] | tuple[Tensor, ...]) -> Scaled:
    """Matrices stacked and transposed, `[D, rows_1 + rows_2 + ...]`, each of the D columns with one scale.

    Args:
        parts: matrices `[rows_i, D]`, bf16 or fp32.
    """
    if not parts[0].is_cuda:
        return quantise_rows_plain([part.T for part in parts])
    from .matmul_triton import quantise_columns_kernel

    return Scaled(*quantise_columns_kernel([part.contiguous() for part in parts]))


def quantise_rows_plain(parts: list[Tensor]) -> Scaled:
    """Plain definition of `quantise_rows`."""
    joined = torch.cat([part.float() for part in parts], dim=1)
    amax = joined.abs().amax(1, keepdim=True).clamp(min=SMALLEST_AMAX)
    return Scaled((joined * (LARGEST / amax)).to(FORMAT), amax / LARGEST)


def scaled_product(left: Scaled, right: Scaled, *, fast: bool) -> Tensor:
    """`left @ right.T` in bf16, added up in fp32.

    Args:
        left: `[M, K]` with a scale a row; right: `[N, K]` with a scale a row.
        fast: Hopper's tensor cores may add up with fewer bits than fp32; usual in the forward pass only.
    """
    if not left.values.is_cuda:
        return scaled_product_plain(left, right)
    return torch._scaled_mm(
        left.values,
        right.values.T,  # column-major, as float8 products want it
        scale_a=left.scale,
        scale_b=right.scale.view(1, -1),
        out_dtype=torch.bfloat16,
        use_fast_accum=fast,
    )


def scaled_product_plain(left: Scaled, right: Scaled) -> Tensor:
    """Plain definition of `scaled_product`."""
    y = left.values.float() @ right.values.float().T
    return (y * left.scale * right.scale.view(1, -1)).bfloat16()
