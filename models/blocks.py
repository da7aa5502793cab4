"""Parts that several families build their blocks from. The arithmetic is in models/ops."""

import functools
from collections.abc import Callable

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from .ops.linear import recomputation_contexts, swiglu_mlp
from .ops.norm import rms_norm

HALF = (torch.bfloat16, torch.float16)


def at_least_fp32(x: Tensor) -> Tensor:
    """Decays, step sizes and gates leave half precision; float64 stays."""
    return x.float() if x.dtype in HALF else x


class KeepFp32(nn.Module):
    """A module whose own parameters stay in fp32 when the model is cast to half precision.

    Norm weights and the decay parameters A_log, dt_bias and D are small and sensitive: `model.bfloat16()`
    moves them but does not round them.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for child in self.children() if recurse else ():
            child._apply(fn)

        def keep(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            rounded = changed.dtype in HALF and tensor.dtype not in HALF
            return tensor.to(changed.device) if rounded else changed

        return super()._apply(keep, recurse=False)


class RMSNorm(KeepFp32):
    """`x / rms(x) * weight` over the last axis, computed in at least fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:  # [..., size]
        return rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202): `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor, norm: RMSNorm, recompute: bool = False) -> Tensor:
        """Residual stream [B, T, D] -> the stream with the MLP of the normed stream added.

        recompute: form the two wide products again in the backward pass instead of keeping them.
        """
        weights = (self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)
        return swiglu_mlp(x, norm.weight, norm.eps, *weights, recompute=recompute)


def recomputed(part: Callable, ends_in_product: bool = True) -> Callable:
    """`part`, keeping its inputs alone and running again in the backward pass where gradients are wanted.

    ends_in_product: its last product may be skipped in the second run (`gated_norm_linear`).
    """
    if not torch.is_grad_enabled():
        return part
    # nothing in a block is random, so there is no generator state to replay
    options = {"use_reentrant": False, "preserve_rng_state": False}
    if ends_in_product:
        options["context_fn"] = recomputation_contexts
    return functools.partial(torch.utils.checkpoint.checkpoint, part, **options)


def assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Sets a parameter, unless transformers has marked it as loaded from a checkpoint."""
    if not getattr(parameter, "_is_hf_initialized", False):
        parameter.data.copy_(value)
