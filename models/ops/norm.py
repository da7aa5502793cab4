"""Root-mean-square norms: plain, with a residual added in front, and gated (GLA and Mamba2 order).

Shapes: x `[..., G * D]` is seen as G groups of D channels, each with its own root mean square. G = 1 for the
norms between blocks, the number of heads for GLA's output norm, `n_groups` for Mamba2's gated norm.

RMSNorm: arXiv 1910.07467, eq. 4. Gate after the norm: GLA, arXiv 2312.06635, section 4. Gate before the norm:
Mamba2, arXiv 2405.21060, section 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / rms(x) * weight` over the last axis, computed in at least fp32.

    Args:
        x: `[..., D]`.
        weight: `[D]`.
        eps: added to the mean square.
        residual: `[..., D]`, added to x before the norm. The sum is in the residual's dtype.
        backend: see `models/ops/backend.py`.

    Returns:
        y in x's dtype; with `residual` the pair (y, x + residual).
    """
    if resolve("rms_norm", x.device, _offered(x, weight, weight.numel()), backend) == "triton":
        from .norm_triton import fused_norm

        y, total = fused_norm(x, weight, eps, residual=residual)
        return y if residual is None else (y, total)
    total = x if residual is None else residual + x.to(residual.dtype)
    y = _normalise(total, weight, eps).to(x.dtype)
    return y if residual is None else (y, total)


def gated_rms_norm(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    *,
    norm_before_gate: bool,
    groups: int = 1,
    backend: str | None = None,
) -> Tensor:
    """RMS norm of each group, multiplied by `silu(gate)` after the norm or before it.

    Args:
        x: `[..., G * D]`.
        gate: `[..., G * D]`.
        weight: `[D]`, shared by the groups (GLA's heads), or `[G * D]` (Mamba2).
        eps: added to the mean square.
        norm_before_gate: True gives `norm(x) * silu(gate)` (GLA), False `norm(x * silu(gate))` (Mamba2).
        groups: G.
        backend: see `models/ops/backend.py`.

    Returns:
        `[..., G * D]` in x's dtype.

    Raises:
        ValueError: the channels do not divide into `groups`, or the weight fits neither D nor G * D.
    """
    channels = x.shape[-1]
    if channels % groups or weight.numel() not in (channels, channels // groups):
        raise ValueError(
            f"{channels} channels, {groups} groups and a weight of {weight.numel()} do not fit together"
        )
    offered = _offered(x, weight, channels // groups)
    if resolve("gated_rms_norm", x.device, offered, backend) == "triton":
        from .norm_triton import fused_norm

        return fused_norm(x, weight, eps, gate=gate, norm_before_gate=norm_before_gate, groups=groups)[0]
    dtype = torch.promote_types(x.dtype, torch.float32)
    grouped = x.to(dtype).unflatten(-1, (groups, -1))  # [..., G, D]
    act = F.silu(gate.to(dtype)).unflatten(-1, (groups, -1))
    weight = weight.view(-1, channels // groups)  # [1 or G, D]
    y = _normalise(grouped, weight, eps) * act if norm_before_gate else _normalise(grouped * act, weight, eps)
    return y.flatten(-2).to(x.dtype)


def _offered(x: Tensor, weight: Tensor, row: int) -> tuple[str, ...]:
    # the kernels hold one row in registers and compute in fp32
    fits = row <= 16384 and torch.float64 not in (x.dtype, weight.dtype) and x.numel() > 0
    return ("triton", "torch") if fits else ("torch",)


def _normalise(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
