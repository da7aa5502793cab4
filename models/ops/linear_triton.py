"""CUDA path of `linear.py`: cuBLAS products around the Triton kernels of the norms and of SwiGLU."""

import torch

from .activation_triton import swiglu_backward, swiglu_forward
from .matmul import bias_gradient as _bias_gradient
from .matmul import input_gradient as _input_gradient
from .matmul import product as _product
from .matmul import weight_gradient as _weight_gradient
from .norm_triton import norm_backward, norm_forward, rows_of


class FusedNormLinear(torch.autograd.Function):
    """See `norm_linear`."""

    @staticmethod
    def forward(ctx, x, norm_weight, eps, dtype, count, *weights_and_biases):
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        with torch.autocast(x.device.type, enabled=False):
            hidden, rows, rstd = norm_forward(x, norm_weight, eps, None, None, True, 1, out_dtype=dtype)
            outputs = [_product(hidden, w, b, None) for w, b in zip(weights, biases, strict=True)]
        ctx.save_for_backward(rows, rstd, norm_weight, *weights_and_biases)
        ctx.options = dtype, count, x.shape
        ctx.set_materialize_grads(False)
        return *(y.view(*x.shape[:-1], -1) for y in outputs), x

    @staticmethod
    def backward(ctx, *gradients):
        rows, rstd, norm_weight, *weights_and_biases = ctx.saved_tensors
        dtype, count, shape = ctx.options
        weights, biases = weights_and_biases[:count], weights_and_biases[count:]
        *dys, dx_through = gradients
        used = [i for i, dy in enumerate(dys) if dy is not None]
        empty = (None,) * (3 + 2 * count)
        if not used:
            return dx_through, None, *empty
        dys = {i: rows_of(dys[i].to(dtype)) for i in used}
        dhidden = _input_gradient([dys[i] for i in used], [weights[i] for i in used])
        dx, _, dnorm, hidden = norm_backward(
            dhidden, dx_through, rows, None, norm_weight, rstd, True, 1, rows.dtype, y_dtype=dtype
        )
        del dhidden
        dweights = [_weight_gradient(dys[i], hidden, w) if i in dys else None for i, w in enumerate(weights)]
        dbiases = [_bias_gradient(dys[i], b) if i in dys else None for i, b in enumerate(biases)]
        return dx.view(shape), dnorm.to(norm_weight.dtype), None, None, None, *dweights, *dbiases


class FusedGatedNormLinear(torch.autograd.Function):
    """See `gated_norm_linear`.

    In a checkpointed region `phase` is "first" or "again". The second run's output holds nothing, since only
    what it saves is wanted; both then save the same tensors, without the root mean squares.
    """

    @staticmethod
    def forward(
        ctx, x, gate, norm_weight, eps, norm_before_gate, groups, dtype, weight, bias, residual, phase
    ):
        rows, order = rows_of(x), (norm_before_gate, groups)
        ctx.options = eps, order, dtype, x.shape, None if residual is None else residual.dtype
        rstd = None
        if phase == "again":
            y = x.new_empty(len(rows), len(weight), dtype=dtype if residual is None else residual.dtype)
        else:
            with torch.autocast(x.device.type, enabled=False):
                hidden, _, rstd = norm_forward(rows, norm_weight, eps, None, gate, *order, out_dtype=dtype)
                y = _product(hidden, weight, bias, None if residual is None else rows_of(residual))
        ctx.save_for_backward(rows, gate, norm_weight, weight, bias, None if phase else rstd)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, dy):
        rows, gate, norm_weight, weight, bias, rstd = ctx.saved_tensors
        eps, order, dtype, shape, residual_dtype = ctx.options
        dresidual = None if residual_dtype is None else dy
        dy = rows_of(dy.to(dtype))
        if rstd is None:
            rstd = norm_forward(rows, norm_weight, eps, None, gate, *order, out_dtype=dtype)[2]
        dhidden = _input_gradient([dy], [weight])
        dx, dgate, dnorm, hidden = norm_backward(
            dhidden, None, rows, gate, norm_weight, rstd, *order, rows.dtype, y_dtype=dtype
        )
        del dhidden
        dweight, dbias = _weight_gradient(dy, hidden, weight), _bias_gradient(dy, bias)
        dnorm = dnorm.view(norm_weight.shape).to(norm_weight.dtype)
        gradients = dx.view(shape), dgate.view(gate.shape), dnorm
        return *gradients, None, None, None, None, dweight, dbias, dresidual, None


class FusedSwiGLUMLP(torch.autograd.Function):
    """See `swiglu_mlp`."""

    @staticmethod
    def forward(ctx, x, norm_weight, eps, dtype, recompute, gate_weight, up_weight, down_weight):
        with torch.autocast(x.device.type, enabled=False):
            hidden, rows, rstd = norm_forward(x, norm_weight, eps, None, None, True, 1, out_dtype=dtype)
            gate, up = _product(hidden, gate_weight, None, None), _product(hidden, up_weight, None, None)
            del hidden
            y = _product(swiglu_forward(gate, up), down_weight, None, rows)
        kept = () if recompute else (gate, up)
        ctx.save_for_backward(rows, rstd, norm_weight, gate_weight, up_weight, down_weight, *kept)
        ctx.options = eps, dtype, x.shape
        return y.view(x.shape)

    @staticmethod
    def backward(ctx, dy):
        rows, rstd, norm_weight, gate_weight, up_weight, down_weight, *kept = ctx.saved_tensors
        eps, dtype, shape = ctx.options
        stream_gradient = rows_of(dy)
        dy = stream_gradient.to(dtype)
        hidden = None
        if not kept:
            hidden = norm_forward(rows, norm_weight, eps, None, None, True, 1, out_dtype=dtype)[0]
            kept = [_product(hidden, weight, None, None) for weight in (gate_weight, up_weight)]
        dgate, dup, product = swiglu_backward(_input_gradient([dy], [down_weight]), *kept, recompute=True)
        del kept
        ddown = _weight_gradient(dy, product, down_weight)
        del product
        dhidden = _input_gradient([dgate, dup], [gate_weight, up_weight])
        dx, _, dnorm, formed = norm_backward(
            dhidden, stream_gradient, rows, None, norm_weight, rstd, True, 1, rows.dtype,
            y_dtype=dtype if hidden is None else None,
        )  # fmt: skip
        del dhidden
        hidden = formed if hidden is None else hidden
        dgate_weight = _weight_gradient(dgate, hidden, gate_weight)
        dup_weight = _weight_gradient(dup, hidden, up_weight)
        return dx.view(shape), dnorm.to(norm_weight.dtype), None, None, None, dgate_weight, dup_weight, ddown
