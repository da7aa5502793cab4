"""The operators that benchmarks.operators measures: inputs, implementations, and what they need at least.

FLOPs count the arithmetic that the definition asks for: 4 for each state element and token of a recurrence
(written to, read from), twice that in its backward pass; what working in chunks adds is not counted. Bytes
count each input and output once, in the dtype it has. Both are per token; `fixed_bytes` is for weights.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.operators_gla import SHAPES as GLA_SHAPES
from models.ops.activation import swiglu
from models.ops.conv import causal_conv1d
from models.ops.cross_entropy import linear_cross_entropy
from models.ops.gla import gla_gated
from models.ops.norm import gated_rms_norm, rms_norm
from models.ops.ssd import ssd

EPS = 1e-6
Draw = Callable[..., Tensor]  # (*shape, dtype=bfloat16) -> normal numbers that want a gradient
Call = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Work:
    """What a token asks for; FLOPs of 0 are not shown."""

    flops: float
    moved: float  # bytes
    fixed_bytes: float = 0


@dataclass(frozen=True)
class Case:
    """An operator at one shape."""

    operator: str
    shape: str
    inputs: Callable[[Draw, int], dict[str, Tensor]]  # (draw, tokens) -> the call's arguments
    calls: dict[str, Call]  # by implementation, ours first
    forward: Work
    backward: Work | None  # None: the forward pass forms the gradients, both are one figure
    constants: tuple[str, ...] = ()  # inputs without a gradient


def cases() -> list[Case]:
    """Everything that is measured, the expanded states among it."""
    found = [_gla(title, *shape) for title, shape in GLA_SHAPES.items()]
    found += [_ssd(state_size) for state_size in (128, 512)]
    found += [_conv(channels) for channels in (4352, 5120)]
    found += [_cross_entropy(words) for words in (32000, 50288)]
    return [*found, _norm(2048), _gla_norm(4, 512), _mamba_norm(4096), _swiglu(5632)]


def _gla(title: str, heads: int, K: int, V: int) -> Case:
    """From the gate's logits; fla's kernels want log decays, which torch forms first, as fla's model does."""

    def inputs(draw: Draw, tokens: int) -> dict[str, Tensor]:
        widths = {"q": K, "k": K, "v": V, "gate": K}
        return {name: draw(1, tokens, heads, width) for name, width in widths.items()}

    def call(backend: str | None, **given: Tensor) -> tuple[Tensor, ...]:
        return (gla_gated(**given, scale=K**-0.5, backend=backend)[0],)

    state, bytes_k, bytes_v = heads * K * V, 2 * heads * K, 2 * heads * V
    return Case(
        "GLA",
        f"{title}, K={K}, V={V}",
        inputs,
        {"ours": partial(call, None), "fla": partial(call, "fla")},
        Work(4 * state, 3 * bytes_k + 2 * bytes_v),
        Work(8 * state, 6 * bytes_k + 3 * bytes_v),
    )


def _ssd(state_size: int, heads: int = 64, head_dim: int = 64) -> Case:
    def inputs(draw: Draw, tokens: int) -> dict[str, Tensor]:
        steps = torch.nn.functional.softplus(draw(1, tokens, heads, dtype=torch.float32).detach() - 3)
        return {
            "x": draw(1, tokens, heads, head_dim),
            "dt": steps.requires_grad_(),
            "A": (-1 - 15 * torch.rand(heads, device=steps.device)).requires_grad_(),
            "B": draw(1, tokens, 1, state_size),
            "C": draw(1, tokens, 1, state_size),
            "D": draw(heads, dtype=torch.float32),
        }

    def call(backend: str | None, **given: Tensor) -> tuple[Tensor, ...]:
        return (ssd(**given, backend=backend)[0],)

    state, bytes_x, others = heads * head_dim * state_size, 2 * heads * head_dim, 4 * heads + 4 * state_size
    return Case(
        "SSD",
        f"{heads} heads of {head_dim}, N={state_size}",
        inputs,
        {"ours": partial(call, None), "mamba_ssm": partial(call, "mamba_ssm")},
        Work(4 * state, 2 * bytes_x + others),
        Work(8 * state, 3 * bytes_x + 2 * others),
    )


def _conv(channels: int, width: int = 4) -> Case:
    def inputs(draw: Draw, tokens: int) -> dict[str, Tensor]:
        return {"x": draw(1, tokens, channels), "weight": draw(channels, width), "bias": draw(channels)}

    def call(backend: str | None, **given: Tensor) -> tuple[Tensor, ...]:
        return (causal_conv1d(**given, activation="silu", backend=backend)[0],)

    return Case(
        "convolution + SiLU",
        f"{channels} channels",
        inputs,
        {"ours": partial(call, None), "causal_conv1d": partial(call, "mamba_ssm")},
        Work(2 * width * channels, 4 * channels),
        Work(4 * width * channels, 6 * channels),
    )


def _cross_entropy(words: int, hidden: int = 2048) -> Case:
    def inputs(draw: Draw, tokens: int) -> dict[str, Tensor]:
        rows = draw(tokens, hidden)
        labels = torch.randint(words, (tokens,), device=rows.device)
        head = (draw(words, hidden).detach() * hidden**-0.5).requires_grad_()
        return {"hidden": rows, "weight": head, "labels": labels}

    def ours(**given: Tensor) -> tuple[Tensor, ...]:
        return (linear_cross_entropy(**given),)

    def fla(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        module = importlib.import_module("fla.modules.fused_linear_cross_entropy")
        return (module.fused_linear_cross_entropy_loss(hidden, labels, weight),)

    return Case(
        "linear + cross-entropy",
        f"{hidden} to {words} words",
        inputs,
        {"ours": ours, "fla": fla},
        Work(6 * hidden * words, 4 * hidden, 4 * hidden * words),
        None,
        ("labels",),
    )


def _norm(channels: int) -> Case:
    def inputs(draw: Draw, tokens: int) -> dict[str, Tensor]:
        x, residual = draw(1, tokens, channels), draw(1, tokens, channels)
        return {"x": x, "residual": residual, "weight": draw(channels, dtype=torch.float32)}

    def ours(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return rms_norm(x, weight, EPS, residual=residual)

    def fla(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        function = importlib.import_module("fla.modules.norm.layernorm").rms_norm
        return function(x, weight, None, residual=residual, eps=EPS, prenorm=True)

    work = Work(0, 8 * channels)
    return Case("residual + RMS norm", f"{channels}", inputs, {"ours": ours, "fla": fla}, work, work)


def _gate_inputs(channels: int, weights: int, draw: Draw, tokens: int) -> dict[str, Tensor]:
    x, gate = draw(1, tokens, channels), draw(1, tokens, channels)
    return {"x": x, "gate": gate, "weight": draw(weights, dtype=torch.float32)}


def _gla_norm(heads: int, width: int) -> Case:
    def ours(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (gated_rms_norm(x, gate, weight, EPS, norm_before_gate=True, groups=heads),)

    def fla(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        function = importlib.import_module("fla.modules.norm.fused_norm_gate").rms_norm_gated
        x, gate = (t.unflatten(-1, (heads, width)) for t in (x, gate))
        return (function(x, gate, weight, None, activation="swish", eps=EPS),)

    channels = heads * width
    return Case(
        "RMS norm, then gate",
        f"{heads} heads of {width}",
        partial(_gate_inputs, channels, width),
        {"ours": ours, "fla": fla},
        Work(0, 6 * channels),
        Work(0, 10 * channels),
    )


def _mamba_norm(channels: int) -> Case:
    def ours(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (gated_rms_norm(x, gate, weight, EPS, norm_before_gate=False),)

    def mamba(x: Tensor, gate: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        function = importlib.import_module("mamba_ssm.ops.triton.layernorm_gated").rmsnorm_fn
        return (function(x, weight, None, z=gate, eps=EPS, norm_before_gate=False),)

    return Case(
        "gate, then RMS norm",
        f"{channels}",
        partial(_gate_inputs, channels, channels),
        {"ours": ours, "mamba_ssm": mamba},
        Work(0, 6 * channels),
        Work(0, 10 * channels),
    )


def _swiglu(channels: int) -> Case:
    def inputs(draw: Draw, tokens: int) -> dict[str, Tensor]:
        return {"gate": draw(1, tokens, channels), "up": draw(1, tokens, channels)}

    def ours(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (swiglu(gate, up),)

    def fla(gate: Tensor, up: Tensor) -> tuple[Tensor, ...]:
        return (importlib.import_module("fla.modules.activations").swiglu(gate, up),)

    forward, backward = Work(0, 6 * channels), Work(0, 10 * channels)
    return Case("SwiGLU", f"{channels}", inputs, {"ours": ours, "fla": fla}, forward, backward)
