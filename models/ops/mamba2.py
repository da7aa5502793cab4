"""Mamba2's whole token mixer as one operator, where this repository's kernels can run all of it.

Its plain twin is the composition of `norm_linear`, `causal_conv1d`, `ssd` and `gated_norm_linear` in
`models/mamba2.py`, which also serves every other case.
"""

import torch
from torch import Tensor

from .backend import resolve, setting
from .dtypes import product_dtype
from .ssd import KERNEL_HEAD_DIMS, KERNEL_STATE_SIZES

KERNEL_CONV_WIDTHS = (2, 3, 4)


def mixer_is_fused(u: Tensor, head_dim: int, state_size: int, conv_width: int) -> bool:
    """Whether `mamba2_mixer` runs on the stream u `[B, T, D]`; another backend may be asked for instead."""
    shaped = head_dim in KERNEL_HEAD_DIMS and state_size in KERNEL_STATE_SIZES
    shaped = shaped and conv_width in KERNEL_CONV_WIDTHS and u.numel() > 0
    if not u.is_cuda or not shaped or u.dtype == torch.float64 or setting() == "mamba_ssm":
        return False
    return resolve("mamba2_mixer", u.device, ("triton", "torch")) == "triton"


def mamba2_mixer(
    u: Tensor,
    parameters: tuple[Tensor | None, ...],
    options: dict,
    conv_state: Tensor | None = None,
    recurrent_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The stream behind the mixer, its own output added.

    Args:
        u: `[B, T, D]`, the residual stream.
        parameters: in the order of `mamba2_triton.Parameters`.
        options: the fields of `mamba2_triton.Options` but for the dtype, which is autocast's or u's.
        conv_state: the last W - 1 inputs of the convolution `[S, H P + 2 G N, W - 1]`.
        recurrent_state: `[S, H, P, N]`.
        cu_seqlens: `[S + 1]`, boundaries of sequences in one row.

    Returns:
        The stream `[B, T, D]`; the states of the convolution and of the recurrence (None unless asked for).
    """
    from .mamba2_triton import Options, Parameters, fused_mixer

    options = Options(dtype=product_dtype(u), **options)
    return fused_mixer(u, Parameters(*parameters), options, conv_state, recurrent_state, cu_seqlens)
