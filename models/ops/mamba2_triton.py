"""Mamba2's token mixer as one autograd function on CUDA, so that it decides by itself what stays in memory.

It computes what `Mamba2Mixer` composes from operators, with the same kernels; the composition is its plain
twin. What one function can do and a composition cannot:

- Of the residual stream u it keeps xhat = u / rms(u) in the dtype of the products: half of an fp32 stream,
  and all that a fully recomputed layer keeps. The norm's weight w is multiplied into the columns of W_in, so
  that xhat is the product's input, and dW_in = (dP^T xhat) * w and dw = sum over rows of (dP^T xhat) * W_in.
- z, x, B, C and dt come out of one product, and their gradients go into one tensor: one product back.
- A scan that is recomputed shares its decays, scores and states with the scan's own backward pass.
- The residual can be added in place, since nothing keeps u.

| recompute | kept for the backward pass, besides xhat                                       |
| --------- | ------------------------------------------------------------------------------ |
| `none`    | P = [z, x, B, C, dt], the convolution's output, the recurrence's output y      |
| `conv`    | P and y                                                                        |
| `scan`    | P                                                                              |
| `full`    | nothing                                                                        |

Shapes: B batch, T tokens, D hidden, R rows of W_in, H heads, P head dimension, G groups, N state size,
W convolution width, S sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .conv import final_inputs
from .conv_triton import bounds_of, convolve, convolve_backward
from .fold_triton import fold, unfold
from .matmul import bias_gradient, input_gradient, product, weight_gradient
from .norm_triton import norm_backward, norm_forward, rows_of
from .ssd_triton import Scan, outputs, prepared, split_packed, ssd_backward, start_scan
from .ssd_triton_shape import Shape
from .steps_triton import step_sizes, step_sizes_backward

RECOMPUTE = ("none", "conv", "scan", "full")


class Parameters(NamedTuple):
    """Of one mixer and the norm in front of it."""

    norm: Tensor  # [D]
    in_proj: Tensor  # [R, D], rows z, x, B, C, dt
    in_bias: Tensor | None  # [R]
    conv: Tensor  # [H P + 2 G N, W]
    conv_bias: Tensor | None
    dt_bias: Tensor  # [H]
    A_log: Tensor  # [H]
    D: Tensor  # [H]
    gated_norm: Tensor  # [H P]
    out_proj: Tensor  # [D, H P]
    out_bias: Tensor | None  # [D]


@dataclass(frozen=True)
class Options:
    """What is no tensor."""

    groups: int
    state_size: int
    eps: float
    gated_eps: float
    time_step_limit: tuple[float, float]
    dtype: torch.dtype  # of the products
    recompute: str = "none"
    output_state: bool = False
    in_place: bool = False  # the stream's memory may be overwritten


def fused_mixer(
    u: Tensor,
    parameters: Parameters,
    options: Options,
    conv_state: Tensor | None = None,
    recurrent_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Residual stream `[B, T, D]` -> the stream behind the mixer; the states of the convolution `[S, C, W-1]`
    and of the recurrence `[S, H, P, N]` (None unless `output_state`)."""
    return FusedMixer.apply(u, conv_state, recurrent_state, cu_seqlens, options, *parameters)


class FusedMixer(torch.autograd.Function):
    """See `fused_mixer`."""

    @staticmethod
    def forward(ctx, u, conv_state, recurrent_state, cu_seqlens, options, *parameters):
        w = Parameters(*parameters)
        carried = conv_state, recurrent_state, cu_seqlens
        in_place = options.in_place and u.is_contiguous() and not u._is_view()
        with torch.autocast(u.device.type, enabled=False):
            rows = rows_of(u)
            unit = torch.ones_like(w.norm)
            xhat, _, rstd = norm_forward(
                rows, unit, options.eps, None, None, True, 1, out_dtype=options.dtype
            )
            parts = Parts(xhat.view(*u.shape), w, options, carried)
            y, final = parts.forward()
            hidden, _, gated_rstd = norm_forward(
                rows_of(y.flatten(-2)), w.gated_norm, options.gated_eps, None, parts.z, False, options.groups,
                out_dtype=options.dtype,
            )  # fmt: skip
            out = u if in_place else u.clone(memory_format=torch.contiguous_format)
            _add_output(rows_of(out), hidden, w)
        kept = {"none": (parts.projected, parts.convolved, y), "conv": (parts.projected, None, y)}
        kept |= {"scan": (parts.projected, None, None), "full": (None, None, None)}
        ctx.save_for_backward(xhat, rstd, gated_rstd, *carried, *w, *kept[options.recompute])
        ctx.options, ctx.shape, ctx.stream = options, u.shape, u.dtype
        ctx.set_materialize_grads(False)
        tail = (
            final_inputs(parts.xBC, w.conv.shape[1], conv_state, cu_seqlens) if options.output_state else None
        )
        if in_place:
            ctx.mark_dirty(u)
        return out, tail, final

    @staticmethod
    def backward(ctx, du, dtail, dfinal):
        xhat, rstd, gated_rstd, *saved = ctx.saved_tensors
        carried, w, kept = saved[:3], Parameters(*saved[3:-3]), saved[-3:]
        options, wanted = ctx.options, Parameters(*ctx.needs_input_grad[5:])
        with torch.autocast(xhat.device.type, enabled=False):
            parts = Parts(xhat.view(ctx.shape), w, options, carried, *kept[:2])
            du = torch.zeros_like(xhat, dtype=ctx.stream) if du is None else rows_of(du)
            projected, states, gradients = parts.backward(
                du.to(options.dtype), dtail, dfinal, kept[2], gated_rstd, wanted
            )
            gradients |= _input_map_gradients(projected, xhat, w, wanted)
            dxhat = input_gradient([projected], [parts.folded])
            del projected, parts
            unit = torch.ones_like(w.norm)
            dx, *_ = norm_backward(dxhat, du, xhat, None, unit, rstd, True, 1, du.dtype, normed=True)
        gradients = [gradients[name] if asked else None for name, asked in zip(w._fields, wanted)]
        return dx.view(ctx.shape), *states, None, None, *gradients


class Parts:
    """The mixer between its two norms: each intermediate tensor, kept or made again when it is asked for."""

    def __init__(
        self,
        xhat: Tensor,
        w: Parameters,
        options: Options,
        carried: tuple[Tensor | None, ...],
        projected: Tensor | None = None,
        convolved: Tensor | None = None,
    ) -> None:
        self.w, self.options = w, options
        self.conv_state, self.recurrent_state, self.cu_seqlens = carried
        self.heads, self.inner = len(w.dt_bias), len(w.gated_norm)
        self.folded = fold(w.in_proj, w.norm, options.dtype)
        if projected is None:
            projected = product(rows_of(xhat), self.folded, w.in_bias, None)
        self.projected = projected  # [B T, R]
        by_token = projected.view(*xhat.shape[:2], -1)
        self.z, self.xBC, self.raw = by_token.split([self.inner, len(w.conv), self.heads], dim=-1)
        if convolved is None:
            convolution = w.conv, w.conv_bias, self.conv_state, self.cu_seqlens
            convolved, *self.bounds = convolve(self.xBC, *convolution, True)
        else:
            self.bounds = bounds_of(self.xBC, self.cu_seqlens)
        self.convolved = convolved  # [B, T, H P + 2 G N]

    def scan_inputs(self) -> tuple[tuple[Tensor | None, ...], Shape]:
        """What the SSD kernels read: x, dt, A, B, C, D and the initial state."""
        x, B, C = split_packed(self.convolved, self.heads, self.options.groups, self.options.state_size)
        dt = step_sizes(self.raw.flatten(0, 1), self.w.dt_bias, self.options.time_step_limit)
        dt = dt.view(self.raw.shape)
        A = -torch.exp(self.w.A_log.float())
        return prepared(x, dt, A, B, C, self.w.D, self.recurrent_state), Shape(x, B, self.cu_seqlens)

    def forward(self) -> tuple[Tensor, Tensor | None]:
        """y `[B, T, H, P]` and the final state."""
        inputs, shape = self.scan_inputs()
        scan, final = start_scan(shape, inputs, self.options.output_state)
        return _outputs(shape, inputs, scan), final

    def backward(
        self,
        du: Tensor,
        dtail: Tensor | None,
        dfinal: Tensor | None,
        y: Tensor | None,
        gated_rstd: Tensor,
        wanted: Parameters,
    ) -> tuple[Tensor, tuple[Tensor | None, ...], dict[str, Tensor | None]]:
        """Gradient of P `[B T, R]`, of the two initial states, and of all parameters behind W_in."""
        w = self.w
        inputs, shape = self.scan_inputs()
        scan, _ = start_scan(shape, inputs, False)
        y = _outputs(shape, inputs, scan) if y is None else y
        dprojected = torch.empty_like(self.projected)
        dz, dxBC, draw = dprojected.view(*self.raw.shape[:2], -1).split(
            [self.inner, len(w.conv), self.heads], dim=-1
        )
        dhidden = input_gradient([du], [w.out_proj])
        order = False, self.options.groups  # the gate comes before the norm
        dy, _, dgated_norm, hidden = norm_backward(
            dhidden, None, rows_of(y.flatten(-2)), self.z, w.gated_norm, gated_rstd, *order, y.dtype,
            dgate=rows_of(dz), y_dtype=self.options.dtype,
        )  # fmt: skip
        dout_proj = weight_gradient(du, hidden, w.out_proj) if wanted.out_proj else None
        del dhidden, hidden, y
        dconvolved = torch.empty_like(self.convolved)
        split = split_packed(dconvolved, self.heads, self.options.groups, self.options.state_size)
        ddt, dA, dD, drecurrent = ssd_backward(shape, inputs, dy.view(inputs[0].shape), dfinal, *split, scan)
        convolution = w.conv, w.conv_bias, self.conv_state, *self.bounds, self.cu_seqlens
        dconv, dconv_bias, dconv_state = convolve_backward(dconvolved, self.xBC, *convolution, True, dxBC)
        ddt_bias = step_sizes_backward(
            self.raw.flatten(0, 1), w.dt_bias, ddt, draw.flatten(0, 1), self.options.time_step_limit
        )
        if dtail is not None:
            dconv_state = self._add_tail_gradient(dtail, dxBC, dconv_state)
        gradients = {
            "conv": dconv, "conv_bias": dconv_bias, "dt_bias": ddt_bias.to(w.dt_bias.dtype),
            "A_log": (dA * inputs[2]).to(w.A_log.dtype), "D": dD.to(w.D.dtype),
            "gated_norm": dgated_norm.to(w.gated_norm.dtype), "out_proj": dout_proj,
            "out_bias": bias_gradient(du, w.out_bias),
        }  # fmt: skip
        return dprojected, (dconv_state, drecurrent), gradients

    def _add_tail_gradient(self, dtail: Tensor, dxBC: Tensor, dconv_state: Tensor | None) -> Tensor | None:
        """The carried inputs of the convolution are a selection from its inputs and its initial state."""
        with torch.enable_grad():
            xBC = self.xBC.detach().requires_grad_()
            state = None if self.conv_state is None else self.conv_state.detach().requires_grad_()
            tail = final_inputs(xBC, self.w.conv.shape[1], state, self.cu_seqlens)
        selected = [xBC] if state is None else [xBC, state]
        gradients = torch.autograd.grad(tail, selected, dtail.to(tail.dtype), allow_unused=True)
        dxBC += gradients[0]
        if state is None or gradients[1] is None:
            return dconv_state
        return gradients[1] if dconv_state is None else dconv_state + gradients[1]


def _outputs(shape: Shape, inputs: tuple[Tensor | None, ...], scan: Scan) -> Tensor:
    x, _, _, _, C, D, _ = inputs
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    outputs(shape, x, C, scan.states, scan.scores, D, scan.decays, y, forward=True)
    return y


def _add_output(rows: Tensor, hidden: Tensor, w: Parameters) -> None:
    """Adds `hidden @ W_out.T + b_out` to the stream, in place: a product that adds to another tensor would
    copy that first."""
    weight = w.out_proj.to(hidden.dtype)
    if rows.dtype == hidden.dtype:
        rows.addmm_(hidden, weight.T)
    elif hidden.is_cuda:
        torch.addmm(rows, hidden, weight.T, out_dtype=rows.dtype, out=rows)
    else:
        rows += hidden @ weight.T
    if w.out_bias is not None:
        rows += w.out_bias


def _input_map_gradients(
    dprojected: Tensor, xhat: Tensor, w: Parameters, wanted: Parameters
) -> dict[str, Tensor | None]:
    """Of W_in, its bias, and the norm's weight, which multiplies the columns of W_in."""
    gradients = {"in_proj": None, "norm": None, "in_bias": bias_gradient(dprojected, w.in_bias)}
    if wanted.in_proj or wanted.norm:
        folded = weight_gradient(dprojected, xhat, w.in_proj)
        gradients["norm"] = unfold(folded, w.in_proj, w.norm).to(w.norm.dtype)
        gradients["in_proj"] = folded
    return gradients
