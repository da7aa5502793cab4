"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635), as published in `fla-hub/gla-1.3B-100B`.

A layer is a token mixer and a SwiGLU MLP, each behind an RMS norm and added to the residual stream. The mixer
keeps one matrix S [K, V] a head. Every token writes one outer product into it, after each row of it has
decayed by a factor of its own (section 4.4, with the recurrence of equation 3):

    q, k, v = W_q x, W_k x, W_v x                  per head: q, k [K], v [V]
    g       = log sigmoid(W_2 W_1 x + b) / 16      log of the forget gate, [K]; low rank: W_1 has 16 rows
    S_t     = diag(exp(g_t)) S_{t-1} + k_t^T v_t   the state, K * V numbers a head
    o_t     = scale * q_t S_t                      scale = K ** -0.5
    y_t     = W_o (RMSNorm(o_t) * silu(W_g x_t))   the norm runs over each head by itself

Shapes: B batch, T tokens, D hidden size, H heads, K key and V value channels of a head, N sequences.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .blocks import GatedMLP, RMSNorm, assign
from .cache import LayerState
from .config import LanguageModelConfig, check_value
from .draw import Draw
from .families import Family, register_family
from .language_model import LanguageModel
from .ops.gla import gla_gated, made_again
from .ops.linear import gated_norm_linear, norm_linear
from .trunk import Block

GATE_LOGIT_NORMALIZER = 16
GATE_LOW_RANK_DIM = 16


@dataclass(frozen=True)
class GLALayerShape:
    """One layer's token mixer; its state holds num_heads * head_k_dim * state_map * head_v_dim numbers."""

    num_heads: int
    head_k_dim: int
    head_v_dim: int
    query_scale: float
    state_map: int = 1  # 4: q, k and gate logits of each head pass through maps [K, 4K] of their own
    drop_mode: str | None = None  # how the layer was expanded


class GLAConfig(LanguageModelConfig):
    """flash-linear-attention's published GLA fields, and `layers`."""

    model_type = "statex_gla"
    shape_class = GLALayerShape
    unsupported: ClassVar[dict[str, tuple]] = {
        "attn": (None,),
        "feature_map": (None,),
        "use_short_conv": (False, None),
        "use_output_gate": (True,),
        "elementwise_affine": (True,),
        "attnres_block_size": (None,),
        "hidden_act": ("swish", "silu"),
    }

    num_heads: int = 4
    num_kv_heads: int | None = None
    expand_k: float = 0.5
    expand_v: float = 1.0
    hidden_ratio: int | float | None = 4
    intermediate_size: int | None = None  # None: the multiple of 256 at or above int(hidden * ratio * 2 / 3)
    clamp_min: float | None = None  # lower bound of the log forget gate
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    fuse_norm: bool = True  # naming in the published layout: g_norm_swish_gate, or g_norm when False

    def check(self) -> None:
        super().check()
        if self.num_kv_heads not in (None, self.num_heads):
            raise ValueError(
                f"GLAConfig: num_kv_heads={self.num_kv_heads} is not supported; expected none, or "
                f"num_heads={self.num_heads}"
            )
        if self.intermediate_size is None:
            self.intermediate_size = -(-int(self.hidden_size * (self.hidden_ratio or 4) * 2 / 3) // 256) * 256
            check_value("GLAConfig: intermediate_size (from hidden_ratio)", self.intermediate_size, int)
        for name, expand in (("expand_k", self.expand_k), ("expand_v", self.expand_v)):
            width = round(self.hidden_size * expand)
            if width != self.hidden_size * expand or width < 1 or width % self.num_heads:
                raise ValueError(
                    f"GLAConfig: hidden_size={self.hidden_size} * {name}={expand} must be a positive "
                    f"multiple of num_heads={self.num_heads}"
                )

    def uniform_shape(self) -> GLALayerShape:
        head_k_dim = round(self.hidden_size * self.expand_k) // self.num_heads
        head_v_dim = round(self.hidden_size * self.expand_v) // self.num_heads
        return GLALayerShape(self.num_heads, head_k_dim, head_v_dim, query_scale=head_k_dim**-0.5)


class GLAMixer(nn.Module):
    """The token mixer: see the equations above."""

    def __init__(self, config: GLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.shape = shape = config.layer_shape(layer_idx)
        self.clamp_min = config.clamp_min
        D, H, K, V = config.hidden_size, shape.num_heads, shape.head_k_dim, shape.head_v_dim
        self.q_proj = nn.Linear(D, H * K, bias=False)
        self.k_proj = nn.Linear(D, H * K, bias=False)
        self.v_proj = nn.Linear(D, H * V, bias=False)
        self.g_proj = nn.Linear(D, H * V, bias=False)
        self.gk_proj = nn.Sequential(
            nn.Linear(D, GATE_LOW_RANK_DIM, bias=False), nn.Linear(GATE_LOW_RANK_DIM, H * K, bias=True)
        )
        self.g_norm_swish_gate = RMSNorm(V, config.norm_eps)
        self.o_proj = nn.Linear(H * V, D, bias=False)
        if shape.state_map > 1:
            for name in ("q_map", "k_map", "gk_map"):
                self.register_parameter(name, nn.Parameter(torch.empty(H, K, shape.state_map * K)))

    def forward(
        self,
        x: Tensor,
        norm: RMSNorm,
        state: LayerState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
        recompute: str = "none",
    ) -> tuple[Tensor, LayerState | None]:
        """Residual stream [B, T, D] -> the stream with the mixer's output added; state [N, H, K, V].

        recompute: the block's level. In a region that runs again as a whole, the second run keeps for the
        backward pass, which follows at once, what the kernels would otherwise make a third time.
        """
        H, out_norm = self.shape.num_heads, self.g_norm_swish_gate
        inputs = (self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.gk_proj[0])
        q, k, v, gate, low_rank, x = norm_linear(x, norm.weight, norm.eps, [part.weight for part in inputs])
        q, k, v = (t.unflatten(-1, (H, -1)) for t in (q, k, v))
        to_logits = self.gk_proj[1]
        forget, gate_map = low_rank, (to_logits.weight, to_logits.bias)  # the operator makes the logits
        if self.shape.state_map > 1:
            logits, maps = to_logits(low_rank).unflatten(-1, (H, -1)), (self.q_map, self.k_map, self.gk_map)
            q, k, forget = (torch.einsum("bthk,hkj->bthj", t, m) for t, m in zip((q, k, logits), maps))
            gate_map = None
        o, final = gla_gated(
            q,
            k,
            v,
            forget,
            gate_map=gate_map,
            gate_logit_normalizer=GATE_LOGIT_NORMALIZER,
            clamp_min=self.clamp_min,
            scale=self.shape.query_scale,
            initial_state=None if state is None else state["recurrent_state"],
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
            keep=recompute in ("mixer", "full"),
        )  # [B, T, H, V]
        with made_again(o, recompute in ("scan", "mlp")):
            x = gated_norm_linear(
                o.flatten(-2),
                gate,
                out_norm.weight,
                out_norm.eps,
                self.o_proj.weight,
                residual=x,
                norm_before_gate=True,
                groups=H,
                ends_recomputation=True,
            )
        return x, {"recurrent_state": final} if output_state else None

    def state_elements(self) -> int:
        """Numbers in the recurrent state of one sequence."""
        shape = self.shape
        return shape.num_heads * shape.head_k_dim * shape.state_map * shape.head_v_dim

    def conv_elements(self) -> int:
        """Numbers in the convolution's tail of one sequence."""
        return 0

    def flops_per_token(self) -> int:
        """Forward pass: the matrices at 2 FLOPs an element, the state at 4 (written once, read once)."""
        matrices = sum(p.numel() for p in self.parameters() if p.dim() > 1)
        return 2 * matrices + 4 * self.state_elements()


class GLABlock(Block):
    # scan: only the scan's output; mlp: that and the MLP's wide products; mixer, full: all of a part
    recompute_levels = ("none", "scan", "mlp", "mixer", "full")

    def __init__(self, config: GLAConfig, layer_idx: int) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attn = GLAMixer(config, layer_idx)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        mixer = self.unless_kept(self.attn, "mixer", "full")
        x, state = mixer(x, self.attn_norm, state, output_state, cu_seqlens, self.recompute)
        x = self.mlp(x, self.mlp_norm, recompute=self.recompute in ("mlp", "full"))
        return x, state

    @property
    def token_mixer(self) -> GLAMixer:
        return self.attn

    @property
    def mixer_norm(self) -> RMSNorm:
        return self.attn_norm

    def flops_per_token(self) -> int:
        return self.attn.flops_per_token() + 2 * sum(p.numel() for p in self.mlp.parameters())


class GLAForCausalLM(LanguageModel):
    config_class = GLAConfig
    base_model_prefix = "model"
    block_class = GLABlock
    norm_name = "norm"
    _no_split_modules: ClassVar[list[str]] = ["GLABlock"]
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.weight"}
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["attn_norm", "mlp_norm", "norm", "g_norm_swish_gate"]

    def initialize_module(self, module: nn.Module, draw: Draw) -> None:
        """Every matrix normal with `initializer_range`, biases 0, norms 1."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            assign(
                module.weight, draw.normal(module.weight.shape, self.config.initializer_range, module.weight)
            )
            if getattr(module, "bias", None) is not None:
                assign(module.bias, torch.zeros_like(module.bias))
        elif isinstance(module, RMSNorm):
            assign(module.weight, torch.ones_like(module.weight))
        elif isinstance(module, GLAMixer) and module.shape.state_map > 1:
            for parameter in (module.q_map, module.k_map, module.gk_map):
                assign(parameter, draw.xavier_normal(parameter.shape, 0.5, parameter))


# ----------------------------------------------------------------------------------------------------
# the published layout: flash-linear-attention's names

PUBLISHED_FIELDS = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_heads", "num_kv_heads", "expand_k", "expand_v"),
    *("hidden_ratio", "intermediate_size", "clamp_min", "norm_eps", "initializer_range", "fuse_norm"),
    *("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    known = (*PUBLISHED_FIELDS, *GLAConfig.unsupported)
    return {name: raw[name] for name in known if name in raw}


def read_tensor(name: str, tensor: Tensor, config: GLAConfig) -> dict[str, Tensor]:
    """Published name -> ours: the unfused gated norm is renamed, a fused gate_proj is gate and up in one."""
    name = name.replace(".attn.g_norm.", ".attn.g_norm_swish_gate.")
    if name.endswith("mlp.gate_proj.weight") and len(tensor) == 2 * config.intermediate_size:
        gate, up = (half.clone() for half in tensor.chunk(2))
        return {name: gate, name.replace("gate_proj", "up_proj"): up}
    return {name: tensor}


def write_published(model: GLAForCausalLM) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {name: getattr(model.config, name) for name in PUBLISHED_FIELDS}
    config |= {"model_type": "gla", "architectures": ["GLAForCausalLM"], "hidden_act": "swish"}
    ours, theirs = ".g_norm_swish_gate.", ".g_norm_swish_gate." if model.config.fuse_norm else ".g_norm."
    return config, {name.replace(ours, theirs): tensor for name, tensor in model.state_dict().items()}


register_family(Family("gla", GLAConfig, GLAForCausalLM, ("gla",), read_config, read_tensor, write_published))
