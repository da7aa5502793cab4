"""A third family in one file: retention (RetNet, Sun et al. 2023, arXiv 2307.08621), without its rotations.

Put into models/, this file alone makes the family build, train, expand, report, save, load and generate;
test_third_family.py does just that, and docs/expansion.md explains it. The state S [K, V] of head h decays by
a constant: S_t = gamma_h S_{t-1} + k_t^T v_t with gamma_h = 1 - 2 ** (-5 - h).
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .blocks import RMSNorm, assign
from .cache import LayerState
from .config import LanguageModelConfig
from .draw import Draw
from .families import Family, register_family
from .language_model import LanguageModel
from .modes import LayerPlan, Mode, Tensors, register_modes
from .ops.gla import gla
from .trunk import Block


@dataclass(frozen=True)
class RetentionLayerShape:
    head_k_dim: int
    query_scale: float
    drop_mode: str | None = None


class RetentionConfig(LanguageModelConfig):
    model_type = "statex_retention"
    shape_class = RetentionLayerShape

    num_heads: int = 4
    norm_eps: float = 1e-6

    def uniform_shape(self) -> RetentionLayerShape:
        head_k_dim = self.hidden_size // self.num_heads
        return RetentionLayerShape(head_k_dim, query_scale=head_k_dim**-0.5)


class RetentionMixer(nn.Module):
    def __init__(self, config: RetentionConfig, layer_idx: int) -> None:
        super().__init__()
        self.shape, self.num_heads = config.layer_shape(layer_idx), config.num_heads
        D, keys = config.hidden_size, config.num_heads * self.shape.head_k_dim
        self.q_proj = nn.Linear(D, keys, bias=False)
        self.k_proj = nn.Linear(D, keys, bias=False)
        self.v_proj = nn.Linear(D, D, bias=False)
        self.o_proj = nn.Linear(D, D, bias=False)

    def forward(
        self, x: Tensor, state: LayerState | None, output_state: bool, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LayerState | None]:
        projections = (self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (projection(x).unflatten(-1, (self.num_heads, -1)) for projection in projections)
        decay = [math.log(1 - 2.0 ** (-5 - head)) for head in range(self.num_heads)]
        log_gamma = torch.tensor(decay, device=x.device, dtype=torch.promote_types(x.dtype, torch.float32))
        o, final = gla(
            q,
            k,
            v,
            log_gamma[:, None].expand(k.shape).contiguous(),  # [B, T, H, K]
            scale=self.shape.query_scale,
            initial_state=None if state is None else state["recurrent_state"],
            output_final_state=output_state,
            cu_seqlens=cu_seqlens,
        )
        return self.o_proj(o.flatten(-2)), {"recurrent_state": final} if output_state else None

    def state_elements(self) -> int:
        return self.q_proj.out_features * self.v_proj.out_features // self.num_heads

    def conv_elements(self) -> int:
        return 0

    def flops_per_token(self) -> int:
        return 2 * sum(parameter.numel() for parameter in self.parameters()) + 4 * self.state_elements()


class RetentionBlock(Block):
    def __init__(self, config: RetentionConfig, layer_idx: int) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.retention = RetentionMixer(config, layer_idx)

    def forward(
        self,
        x: Tensor,
        state: LayerState | None = None,
        output_state: bool = False,
        cu_seqlens: Tensor | None = None,
    ) -> tuple[Tensor, LayerState | None]:
        y, state = self.unless_kept(self.retention, "full")(self.norm(x), state, output_state, cu_seqlens)
        return x + y, state

    @property
    def token_mixer(self) -> RetentionMixer:
        return self.retention

    @property
    def mixer_norm(self) -> RMSNorm:
        return self.norm


class RetentionForCausalLM(LanguageModel):
    config_class = RetentionConfig
    base_model_prefix = "model"
    block_class = RetentionBlock
    norm_name = "norm"
    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embeddings.weight"}

    def initialize_module(self, module: nn.Module, draw: Draw) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            assign(module.weight, draw.normal(module.weight.shape, 0.02, module.weight))
        elif isinstance(module, RMSNorm):
            assign(module.weight, torch.ones_like(module.weight))


def longer_keys(shape: RetentionLayerShape, factor: int) -> RetentionLayerShape:
    return replace(shape, head_k_dim=factor * shape.head_k_dim)


def extend(old: Tensors, step: LayerPlan, config: RetentionConfig, draw: Draw) -> Tensors:
    """New k rows fresh, new q rows zero, the query scale as before: no logit changes."""
    q, k = (old[f"{name}_proj.weight"].unflatten(0, (config.num_heads, -1)) for name in "qk")  # [H, K, D]
    added = step.new.head_k_dim - step.old.head_k_dim
    rows = draw.normal((config.num_heads, added, config.hidden_size), 0.02, k)
    q, k = torch.cat([q, torch.zeros_like(rows)], dim=1), torch.cat([k, rows], dim=1)
    return {"q_proj.weight": q.flatten(0, 1), "k_proj.weight": k.flatten(0, 1)}


register_modes("retention", {"extend": Mode(longer_keys, extend, factors=(2, 4, 8))})


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    return {name: raw[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers") if name in raw}


def read_tensor(name: str, tensor: Tensor, config: RetentionConfig) -> Tensors:
    return {name: tensor}


def write_published(model: RetentionForCausalLM) -> tuple[dict[str, Any], Tensors]:
    return {"model_type": "retention"}, model.state_dict()


register_family(
    Family(
        name="retention",
        config_class=RetentionConfig,
        model_class=RetentionForCausalLM,
        published_types=("retention",),
        read_config=read_config,
        read_tensor=read_tensor,
        write_published=write_published,
    )
)
