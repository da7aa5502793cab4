"""The matrix products of the fused linear maps: one forward, two of the backward pass.

Tokens are rows: `hidden [tokens, D_in]`, `dy [tokens, D_out]`, `weight [D_out, D_in]`.
"""

import torch
from torch import Tensor


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> Tensor:
    """`hidden @ weight.T + bias + residual`: `[tokens, D_out]` in the residual's dtype, else in
    hidden's."""
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
    total = dys[0] @ weights[0].to(dys[0].dtype)
    for dy, weight in zip(dys[1:], weights[1:], strict=True):
        total.addmm_(dy, weight.to(dy.dtype))
    return total


def bias_gradient(dy: Tensor, bias: Tensor | None) -> Tensor | None:
    """Sum of dy over the tokens in the bias's dtype, formed in fp32."""
    return None if bias is None else dy.sum(0, dtype=torch.float32).to(bias.dtype)
