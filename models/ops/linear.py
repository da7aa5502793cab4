"""Linear maps fused with the cheap operation in front of them and the residual behind them.

A block of a linear RNN is a chain of matrix products with element-wise work in between. Stored as written,
a norm's or a gate's output stays in memory only to become the weight gradient of the next product. These
three operators keep the inputs of the element-wise part instead and compute it again in the backward pass,
where it costs one read:

| operator            | computes                                         | keeps for the backward pass |
| ------------------- | ------------------------------------------------ | --------------------------- |
| `norm_linear`       | `rms_norm(x) @ W_i.T + b_i` for every W_i, and x | x                           |
| `gated_norm_linear` | `gated_rms_norm(x, gate) @ W.T + residual`       | x, gate                     |
| `swiglu_mlp`        | the feed-forward half of a block, residual added | x, gate, up; or x alone     |

`norm_linear` hands x through, so that a block reads `*projections, x = norm_linear(x, ...)` and the
gradients of both uses of x meet inside the norm's backward kernel rather than in a pass of their own. Under
autocast products run in the autocast dtype, and the gradients of fp32 weights come out of the product in
fp32.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .activation import swiglu
from .backend import resolve
from .dtypes import product_dtype
from .norm import gated_rms_norm, rms_norm

_pass = threading.local()


@contextmanager
def _in_region(phase: str) -> Iterator[None]:
    around = getattr(_pass, "phase", None)
    _pass.phase = phase
    try:
        yield
    finally:
        _pass.phase = around


def recomputation_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """`context_fn` of a checkpoint: tells `gated_norm_linear` whether it runs for its result or only to be
    differentiated."""
    return _in_region("first"), _in_region("again")


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None] | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """Several projections of one normed input.

    Args:
        x: `[..., D]`, the residual stream.
        norm_weight: `[D]`.
        eps: of the norm.
        weights: tensors `[D_i, D]`.
        biases: tensors `[D_i]` or None, as many as weights.
        backend: see `models/ops/backend.py`.

    Returns:
        One `[..., D_i]` a weight, in the compute dtype, then x itself.
    """
    biases = [None] * len(weights) if biases is None else list(biases)
    if _fused("norm_linear", x, backend):
        from .linear_triton import FusedNormLinear

        return FusedNormLinear.apply(x, norm_weight, eps, product_dtype(x), len(weights), *weights, *biases)
    hidden = rms_norm(x, norm_weight, eps, backend="torch").to(product_dtype(x))
    return *(
        F.linear(hidden, _like(w, hidden), _like(b, hidden)) for w, b in zip(weights, biases, strict=True)
    ), x


def gated_norm_linear(
    x: Tensor,
    gate: Tensor,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm_before_gate: bool,
    groups: int = 1,
    ends_recomputation: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Output projection of a gated, normed input, added to the residual stream.

    Args:
        x: `[..., G * D]`; gate: the same shape; norm_weight: `[D]` or `[G * D]` (see `gated_rms_norm`).
        eps: of the norm.
        weight: `[D_out, G * D]`; bias: `[D_out]` or None.
        residual: `[..., D_out]`; the sum is in its dtype.
        norm_before_gate, groups, backend: see `gated_rms_norm`.
        ends_recomputation: the caller promises that a checkpointed region ends here, so that a second run of
            it in the backward pass needs the inputs of the product, but not the product.

    Returns:
        `[..., D_out]`.
    """
    order = {"norm_before_gate": norm_before_gate, "groups": groups}
    if _fused("gated_norm_linear", x, backend):
        from .linear_triton import FusedGatedNormLinear

        options = eps, norm_before_gate, groups, product_dtype(x)
        phase = getattr(_pass, "phase", None) if ends_recomputation else None
        return FusedGatedNormLinear.apply(x, gate, norm_weight, *options, weight, bias, residual, phase)
    hidden = gated_rms_norm(x, gate, norm_weight, eps, **order, backend="torch").to(product_dtype(x))
    return _add(F.linear(hidden, _like(weight, hidden), _like(bias, hidden)), residual)


def swiglu_mlp(
    x: Tensor,
    norm_weight: Tensor,
    eps: float,
    gate_weight: Tensor,
    up_weight: Tensor,
    down_weight: Tensor,
    *,
    recompute: bool = False,
    backend: str | None = None,
) -> Tensor:
    """The feed-forward half of a block: `x + (silu(h @ W_gate.T) * (h @ W_up.T)) @ W_down.T`, h the normed x.

    Args:
        x: `[..., D]`, the residual stream.
        norm_weight: `[D]`; eps: of the norm.
        gate_weight, up_weight: `[I, D]`.
        down_weight: `[D, I]`.
        recompute: keep x alone and compute `h @ W_gate.T` and `h @ W_up.T` again in the backward pass (the
            product with W_down is not repeated).
        backend: see `models/ops/backend.py`.

    Returns:
        `[..., D]` in x's dtype.
    """
    weights = gate_weight, up_weight, down_weight
    if _fused("swiglu_mlp", x, backend):
        from .linear_triton import FusedSwiGLUMLP

        return FusedSwiGLUMLP.apply(x, norm_weight, eps, product_dtype(x), recompute, *weights)
    if recompute and torch.is_grad_enabled():
        return checkpoint(_plain_mlp, x, norm_weight, eps, *weights, use_reentrant=False)
    return _plain_mlp(x, norm_weight, eps, *weights)


def _plain_mlp(x, norm_weight, eps, gate_weight, up_weight, down_weight) -> Tensor:
    gate, up, x = norm_linear(x, norm_weight, eps, [gate_weight, up_weight], backend="torch")
    hidden = swiglu(gate, up, backend="torch")
    return _add(F.linear(hidden, _like(down_weight, hidden)), x)


def _fused(operator: str, x: Tensor, backend: str | None) -> bool:
    offered = ("torch",) if x.dtype == torch.float64 or x.numel() == 0 else ("triton", "torch")
    return resolve(operator, x.device, offered, backend) == "triton"


def _like(weight: Tensor | None, hidden: Tensor) -> Tensor | None:
    return None if weight is None else weight.to(hidden.dtype)


def _add(y: Tensor, residual: Tensor | None) -> Tensor:
    return y if residual is None else residual + y.to(residual.dtype)
