"""Mamba2 (Dao & Gu 2024, arXiv 2405.21060), as published in `state-spaces/mamba2-1.3b`.

A layer is one token mixer behind an RMS norm, added to the residual stream. The mixer keeps one matrix S
[P, N] a head; B and C, the keys and queries, are shared by the heads of a group (section 7):

    z, x, B, C, dt = W_in u              u the normed stream; x [H, P], B and C [G, N], dt [H]
    x, B, C  = silu(conv(x, B, C))       causal convolution over the last W tokens, each channel by itself
    dt       = clamp(softplus(dt + dt_bias))
    S_t      = exp(dt_t A) S_{t-1} + dt_t x_t^T B_t        A = -exp(A_log), one number a head
    y_t      = S_t C_t + D x_t
    out      = W_out RMSNorm(y * silu(z))                  the norm runs over each group by itself

Shapes: B batch, T tokens, H heads, P head_dim, G groups, N state_size, W conv_kernel, S sequences.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import KeepFp32, RMSNorm, assign, at_least_fp32, recomputed
from .cache import LayerState
from .config import LanguageModelConfig
from .draw import Draw
from .families import Family, register_family
from .language_model import LanguageModel
from .mamba2_layouts import is_original, read_config, read_tensor, time_step_limit, write_published
from .ops.conv import causal_conv1d
from .ops.linear import gated_norm_linear, norm_linear
from .ops.mamba2 import mamba2_mixer, mixer_is_fused
from .ops.ssd import ssd, ssd_packed
from .trunk import Block

EMBEDDING_STD = 0.02


@dataclass(frozen=True)
class Mamba2LayerShape:
    """Shape of one layer's token mixer; its state holds heads * head_dim * state_size * state_map numbers."""

    state_size: int
    state_map: int = 1  # 4: B and C pass through learned maps N -> 4N after the convolution
    drop_mode: str | None = None  # how the layer was expanded


class Mamba2Config(LanguageModelConfig):
    """transformers' Mamba2 fields, and `layers`.

    transformers' initializer_range is never read: converted checkpoints carry 0.1 there, with which
    no training began. `initialize_module` does what the authors do.
    """

    model_type = "statex_mamba2"
    attribute_map: ClassVar[dict[str, str]] = {"norm_eps": "layer_norm_epsilon"}
    shape_class = Mamba2LayerShape
    unsupported: ClassVar[dict[str, tuple]] = {"hidden_act": ("silu", "swish")}

    num_hidden_layers: int = 48
    num_heads: int = 64
    head_dim: int = 64
    state_size: int = 128
    expand: float = 2  # hidden_size * expand is num_heads * head_dim
    n_groups: int = 1
    conv_kernel: int = 4
    use_bias: bool = False
    use_conv_bias: bool = True
    layer_norm_epsilon: float = 1e-5
    residual_in_fp32: bool = True
    chunk_size: int = 256
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    time_step_limit: Any = None  # [low, high] of dt; read in every form that is in use

    def check(self) -> None:
        super().check()
        self.time_step_limit = time_step_limit(self.time_step_limit)
        inner = self.hidden_size * self.expand
        if inner != self.num_heads * self.head_dim:
            raise ValueError(
                f"Mamba2Config: hidden_size * expand = {inner} must equal num_heads * head_dim = "
                f"{self.num_heads} * {self.head_dim}"
            )
        if self.num_heads % self.n_groups:
            raise ValueError(f"Mamba2Config: n_groups={self.n_groups} must divide num_heads={self.num_heads}")
        if not 0 < self.time_step_min <= self.time_step_max:
            raise ValueError(
                f"Mamba2Config: time_step_min={self.time_step_min} must be above 0 and at most "
                f"time_step_max={self.time_step_max}"
            )

    def uniform_shape(self) -> Mamba2LayerShape:
        return Mamba2LayerShape(self.state_size)


class Mamba2Mixer(KeepFp32):
    """The token mixer: see the equations above. A_log, D and dt_bias stay fp32 in a half-precision model."""

    def __init__(self, config: Mamba2Config, layer_idx: int) -> None:
        super().__init__()
        self.shape = shape = config.layer_shape(layer_idx)
        self.num_heads, self.head_dim, self.n_groups = config.num_heads, config.head_dim, config.n_groups
        self.chunk_size, self.time_step_limit = config.chunk_size, config.time_step_limit
        self.inner = config.num_heads * config.head_dim  # H * P
        self.conv_dim = self.inner + 2 * config.n_groups * shape.state_size  # x, B, C
        rows = self.inner + self.conv_dim + config.num_heads  # z, x, B, C, dt
        self.in_proj = nn.Linear(config.hidden_size, rows, bias=config.use_bias)
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, config.conv_kernel, groups=self.conv_dim, bias=config.use_conv_bias
        )
        self.dt_bias = nn.Parameter(torch.empty(config.num_heads))
        self.A_log = nn.Parameter(torch.empty(config.num_heads))
        self.D = nn.Parameter(torch.empty(config.num_heads))
        self.norm = RMSNorm(self.inner, config.norm_eps)
        self.out_proj = nn.Linear(self.inner, config.hidden_size, bias=config.use_bias)
        if shape.state_map > 1:
            self.B_map = nn.Linear(shape.state_size, shape.state_map * shape.state_size)
            self.C_map = nn.Linear(shape.state_size, shape.state_map * shape.state_size)

    def forward(
        self,
        u: Tensor,
        norm: RMSNorm,
        state: LayerState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        recompute: str = "none",
        in_place: bool = False,
    ) -> tuple[Tensor, LayerState | None]:
        """Residual stream [B, T, D] -> the stream with the mixer's output added, and the carried state.

        State: `recurrent_state` [S, H, P, N], and `conv_state` [S, conv_dim, W - 1], the convolution's last
        inputs. `recompute`: what the backward pass computes again, see `Mamba2Block`. With `in_place` the
        stream's memory may be overwritten.
        """
        decoding = u.shape[1] == 1 and not torch.is_grad_enabled()  # steps have kernels of their own
        if self.shape.state_map == 1 and not decoding and self.is_fused(u):
            return self.fused(u, norm, state, output_state, cu_seqlens, recompute, in_place)
        composed = recomputed(self.composed) if recompute == "full" else self.composed
        return composed(u, norm, state, output_state, cu_seqlens, recompute in ("conv", "scan"))

    def composed(
        self,
        u: Tensor,
        norm: RMSNorm,
        state: LayerState | None,
        output_state: bool,
        cu_seqlens: Tensor | None,
        recompute_scan: bool,
    ) -> tuple[Tensor, LayerState | None]:
        """The equations above, operator by operator."""
        # three products, not one: their outputs and gradients are then whole tensors, never copied into one
        rows = [self.inner, self.conv_dim, self.num_heads]
        biases = None if self.in_proj.bias is None else self.in_proj.bias.split(rows)
        z, xBC, dt, u = norm_linear(u, norm.weight, norm.eps, self.in_proj.weight.split(rows), biases)
        scan = recomputed(self.scan) if recompute_scan else self.scan
        return scan(z, xBC, dt, u, state, output_state, cu_seqlens)

    def scan(
        self,
        z: Tensor,
        xBC: Tensor,
        dt: Tensor,
        u: Tensor,
        state: LayerState | None,
        output_state: bool,
        cu_seqlens: Tensor | None,
    ) -> tuple[Tensor, LayerState | None]:
        """From the projections of u to the stream behind the mixer."""
        carried = {"output_final_state": output_state, "cu_seqlens": cu_seqlens}
        xBC, conv_state = causal_conv1d(
            xBC,
            self.conv1d.weight.squeeze(1),
            self.conv1d.bias,
            activation="silu",
            initial_state=None if state is None else state["conv_state"],
            **carried,
        )
        carried["initial_state"] = None if state is None else state["recurrent_state"]
        y, final = self.recurrence(xBC, dt, D=self.D, chunk_size=self.chunk_size, **carried)
        u = gated_norm_linear(
            y.flatten(-2),
            z,
            self.norm.weight,
            self.norm.eps,
            self.out_proj.weight,
            self.out_proj.bias,
            residual=u,
            norm_before_gate=False,
            groups=self.n_groups,
            ends_recomputation=True,
        )
        return u, {"recurrent_state": final, "conv_state": conv_state} if output_state else None

    def is_fused(self, u: Tensor) -> bool:
        return mixer_is_fused(u, self.head_dim, self.shape.state_size, self.conv1d.kernel_size[0])

    def fused(
        self,
        u: Tensor,
        norm: RMSNorm,
        state: LayerState | None,
        output_state: bool,
        cu_seqlens: Tensor | None,
        recompute: str,
        in_place: bool,
    ) -> tuple[Tensor, LayerState | None]:
        """The same as one function on CUDA, which needs less memory and fewer passes over it."""
        options = {
            "groups": self.n_groups,
            "state_size": self.shape.state_size,
            "eps": norm.eps,
            "gated_eps": self.norm.eps,
            "time_step_limit": tuple(self.time_step_limit),
            "recompute": recompute,
            "output_state": output_state,
            "in_place": in_place,
        }
        parameters = (
            *(norm.weight, self.in_proj.weight, self.in_proj.bias),
            *(self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, self.A_log, self.D),
            *(self.norm.weight, self.out_proj.weight, self.out_proj.bias),
        )
        state = state or {}
        carried = state.get("conv_state"), state.get("recurrent_state"), cu_seqlens
        u, conv_state, final = mamba2_mixer(u, parameters, options, *carried)
        return u, {"recurrent_state": final, "conv_state": conv_state} if output_state else None

    def recurrence(self, xBC: Tensor, dt: Tensor, **options) -> tuple[Tensor, Tensor | None]:
        """y [B, T, H, P] from the convolved x, B and C, and the final state."""
        dt, A = self.step_sizes(dt), -torch.exp(at_least_fp32(self.A_log))
        if self.shape.state_map == 1:
            return ssd_packed(xBC, dt, A, groups=self.n_groups, state_size=self.shape.state_size, **options)
        grouped = self.n_groups * self.shape.state_size
        x, B, C = xBC.split([self.inner, grouped, grouped], dim=-1)
        B, C = (t.unflatten(-1, (self.n_groups, -1)) for t in (B, C))  # [B, T, G, N]
        x = x.unflatten(-1, (self.num_heads, -1))  # [B, T, H, P]
        return ssd(x, dt, A, self.B_map(B), self.C_map(C), **options)  # B and C [B, T, G, 4N]

    def step_sizes(self, dt: Tensor) -> Tensor:
        """[B, T, H], positive, in at least fp32."""
        dt = F.softplus(at_least_fp32(dt) + self.dt_bias)
        low, high = self.time_step_limit
        return dt if low == 0 and math.isinf(high) else dt.clamp(low, high)

    def state_elements(self) -> int:
        """Numbers in the recurrent state of one sequence."""
        return self.inner * self.shape.state_size * self.shape.state_map

    def conv_elements(self) -> int:
        """Numbers in the convolution's tail of one sequence."""
        return self.conv_dim * (self.conv1d.kernel_size[0] - 1)

    def flops_per_token(self) -> int:
        """Forward pass: the matrices at 2 FLOPs an element, the state at 4 (written once, read once)."""
        matrices = self.in_proj.weight.numel() + self.out_proj.weight.numel() + self.conv1d.weight.numel()
        if self.shape.state_map > 1:  # the maps run once a group
            matrices += self.n_groups * (self.B_map.weight.numel() + self.C_map.weight.numel())
        return 2 * matrices + 4 * self.state_elements()


class Mamba2Block(Block):
    """One token mixer. What the backward pass computes again, by `recompute`, each with all before it:

    none, nothing; conv, the convolution; scan, the recurrence; full, W_in too. Operator by operator, conv
    does what scan does.
    """

    recompute_levels = ("none", "conv", "scan", "full")

    def __init__(self, config: Mamba2Config, layer_idx: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mixer = Mamba2Mixer(config, layer_idx)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        carried = state, output_state, cu_seqlens
        return self.mixer(x, self.norm, *carried, self.recompute, self.owns_stream)

    @property
    def token_mixer(self) -> Mamba2Mixer:
        return self.mixer

    @property
    def mixer_norm(self) -> RMSNorm:
        return self.norm


class Mamba2ForCausalLM(LanguageModel):
    config_class = Mamba2Config
    base_model_prefix = "backbone"
    block_class = Mamba2Block
    norm_name = "norm_f"
    _no_split_modules: ClassVar[list[str]] = ["Mamba2Block"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "backbone.embeddings.weight"}
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["A_log", "dt_bias", "D", "norm", "norm_f"]

    def initialize_module(self, module: nn.Module, draw: Draw) -> None:
        """As mamba_ssm does: heads that remember for a few tokens and for many, a small out_proj."""
        if isinstance(module, nn.Embedding):
            assign(module.weight, draw.normal(module.weight.shape, EMBEDDING_STD, module.weight))
        elif isinstance(module, RMSNorm):
            assign(module.weight, torch.ones_like(module.weight))
        elif isinstance(module, Mamba2Mixer):
            initialize_projections(module, self.config, draw)
            initialize_decay(module, self.config, draw)
        elif module is self.lm_head:
            assign(module.weight, draw.linear(module.weight.shape, module.in_features, module.weight))


def initialize_projections(mixer: Mamba2Mixer, config: Mamba2Config, draw: Draw) -> None:
    """U(+-1/sqrt(fan_in)), in out_proj divided by sqrt(layers); biases of linear maps 0."""
    for projection, divisor in ((mixer.in_proj, 1.0), (mixer.out_proj, math.sqrt(config.num_hidden_layers))):
        weight = projection.weight
        assign(weight, draw.linear(weight.shape, projection.in_features, weight) / divisor)
        if projection.bias is not None:
            assign(projection.bias, torch.zeros_like(projection.bias))
    for parameter in mixer.conv1d.parameters():
        assign(parameter, draw.linear(parameter.shape, config.conv_kernel, parameter))
    for state_map in (mixer.B_map, mixer.C_map) if mixer.shape.state_map > 1 else ():
        assign(state_map.weight, draw.xavier_normal(state_map.weight.shape, 0.5, state_map.weight))
        assign(state_map.bias, torch.zeros_like(state_map.bias))


def initialize_decay(mixer: Mamba2Mixer, config: Mamba2Config, draw: Draw) -> None:
    for name, tensor in fresh_decay(mixer.dt_bias, mixer.A_log, config, draw).items():
        assign(mixer.get_parameter(name), tensor)
    assign(mixer.D, torch.ones_like(mixer.D))


def fresh_decay(dt_bias: Tensor, A_log: Tensor, config: Mamba2Config, draw: Draw) -> dict[str, Tensor]:
    """dt log-uniform in [time_step_min, time_step_max] by the inverse softplus, A uniform in [1, 16]."""
    low, high = math.log(config.time_step_min), math.log(config.time_step_max)

    def inverse_softplus(log_dt: Tensor) -> Tensor:
        dt = log_dt.exp().clamp(min=config.time_step_floor)
        return dt + torch.log(-torch.expm1(-dt))

    return {
        "dt_bias": draw.uniform(dt_bias.shape, low, high, dt_bias, then=inverse_softplus),
        "A_log": draw.uniform(A_log.shape, 1.0, 16.0, A_log, then=torch.log),
    }


register_family(
    Family(
        "mamba2",
        Mamba2Config,
        Mamba2ForCausalLM,
        ("mamba2",),
        read_config,
        read_tensor,
        write_published,
        recognises=is_original,
    )
)
