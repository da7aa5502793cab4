"""Enlarge the recurrent state of some layers of a pretrained linear RNN (StateX, arXiv 2509.22630).

plan    `plan_expansion` turns a config and what was asked for into pure data, a `LayerPlan` for each layer
        to expand, or raises ValueError. It needs no weights.
apply   `expand_state` builds all the new mixers beside the old ones, and only then puts them in place.
modes   A mode is one small function and one line in a table. The function gets the old layer's tensors by
        name and returns those that change; what it does not name is inherited as it is.

    python -m models.expansion in=FOLDER out=FOLDER drop_prop=6 drop_mode=extend

docs/expansion.md has the equations, and how to add a mode or a family.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from .draw import Draw
from .expansion_arguments import choose_factor, choose_layers
from .families import family_of
from .mamba2 import fresh_decay
from .modes import MODES, LayerPlan, Mode, Tensors, mode_name, register_modes
from .report import ExpansionReport, state_report
from .surgery import NORM, Replacement, adopt_config, build_replacement, layer_tensors, put_in_place

REINIT = ("standard", "published")

# ----------------------------------------------------------------------------------------------------
# plan: which layer becomes what


def plan_expansion(
    config: Any,
    drop_prop: int | None = None,
    drop_mode: str | None = None,
    *,
    layers: Iterable[int] | None = None,
    expand_factor: int | None = None,
) -> list[LayerPlan]:
    """What `expand_state` does to a model of this config, as pure data, or ValueError."""
    family = family_of(config)
    if not isinstance(config, family.config_class):
        raise ValueError(
            f"a {type(config).__name__} of another library cannot be expanded; use load_pretrained"
        )
    mode = mode_name(family.name, drop_mode)
    factor = choose_factor(mode, MODES[family.name][mode].factors, expand_factor)
    chosen = choose_layers(len(config.layers), drop_prop, layers)
    return [_plan_layer(config, layer, mode, MODES[family.name][mode], factor) for layer in chosen]


def _plan_layer(config: Any, layer: int, name: str, mode: Mode, factor: int) -> LayerPlan:
    old = config.layer_shape(layer)
    if old.drop_mode is not None:
        raise ValueError(
            f"layer {layer} is already expanded (drop_mode={old.drop_mode!r}): choose other layers, or "
            "start from the model as it was before"
        )
    try:
        new = mode.reshape(old, factor)
    except ValueError as error:
        raise ValueError(f"drop_mode={name!r} cannot expand layer {layer}: {error}") from None
    return LayerPlan(layer, name, old, replace(new, drop_mode=name))


# ----------------------------------------------------------------------------------------------------
# apply: build everything first, then put it in place


def expand_state(
    model: nn.Module,
    drop_prop: int | None = None,
    drop_mode: str | None = None,
    *,
    layers: Iterable[int] | None = None,
    expand_factor: int | None = None,
    seed: int = 0,
    freeze_rest: bool = False,
    reinit: str = "standard",
) -> ExpansionReport:
    """Enlarge the recurrent state of some layers of `model`, in place.

    Args:
        model: a model of this repository, on any device (on meta only shapes change), of any dtype.
        drop_prop: layer i is expanded when i % drop_prop == 0; must divide the number of layers.
        drop_mode: name of the mode; None means the family's default (`gla`, `mamba4`).
        layers: the layers to expand, instead of drop_prop.
        expand_factor: growth in `extend`: 2, 4 (when left out) or 8. Other modes fix theirs.
        seed: of one CPU generator, so that it means the same bits on every device.
        freeze_rest: leave only the expanded layers' mixers and the norms in front of them trainable.
        reinit: "standard", or "published" to reset what the published code resets, in the way it does,
            in the merge modes too.

    Raises:
        ValueError: what was asked does not fit the model, which is then unchanged.
    """
    if reinit not in REINIT:
        raise ValueError(f"reinit={reinit!r} is unknown; use one of {', '.join(REINIT)}")
    before, draw = state_report(model), Draw(seed)
    plan = plan_expansion(model.config, drop_prop, drop_mode, layers=layers, expand_factor=expand_factor)
    config = _expanded_config(model.config, plan)
    blocks = list(model.blocks)
    new_mixers = [_new_mixer(blocks[step.layer], step, config, draw, reinit) for step in plan]
    for step, new_mixer in zip(plan, new_mixers):
        put_in_place(blocks[step.layer], new_mixer)
    adopt_config(model, config)
    if freeze_rest:
        freeze_all_but_expanded(model)
    return ExpansionReport(plan=tuple(plan), before=before, after=state_report(model))


def freeze_all_but_expanded(model: nn.Module) -> None:
    """Leave only the expanded layers' mixers and the norms in front of them trainable."""
    shapes = [model.config.layer_shape(layer) for layer in range(len(model.config.layers))]
    expanded = [block for block, shape in zip(model.blocks, shapes) if shape.drop_mode is not None]
    if not expanded:
        raise ValueError("freeze_rest would freeze the whole model: no layer of it is expanded")
    model.requires_grad_(False)
    for block in expanded:
        block.token_mixer.requires_grad_(True)
        block.mixer_norm.requires_grad_(True)


def _expanded_config(config: Any, plan: list[LayerPlan]) -> Any:
    expanded = copy.deepcopy(config)  # a config object may serve other models too, so it is never written to
    shapes = {step.layer: asdict(step.new) for step in plan}
    expanded.layers = [shapes.get(i, layer) for i, layer in enumerate(expanded.layers)]
    return expanded


@torch.no_grad()
def _new_mixer(block: nn.Module, step: LayerPlan, config: Any, draw: Draw, reinit: str) -> Replacement:
    mode = MODES[family_of(config).name][step.mode]
    old = layer_tensors(block)
    tensors = old | mode.fill(old, step, config, draw)
    if reinit == "published" and mode.published:
        tensors |= mode.published(tensors, step, config)
    return build_replacement(block, config, step.layer, tensors)


# ----------------------------------------------------------------------------------------------------
# modes of GLA: the state is [H, K, V]; q_proj, k_proj and gk_proj.1 hold K rows a head, v_proj and g_proj V

GLA_GAIN = 2**-2.5
GATED_NORM = "g_norm_swish_gate.weight"
GLA_QKV_GATE = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "gk_proj.0.weight", "gk_proj.1.weight")


def gla_one_head(shape: Any, factor: int) -> Any:
    """All heads become one: [H, K, V] -> [1, H*K, H*V], a state H times as large."""
    if shape.num_heads == 1:
        raise ValueError("it has one head, so that merging heads would enlarge nothing; use 'extend'")
    key, value = shape.num_heads * shape.head_k_dim, shape.num_heads * shape.head_v_dim
    return replace(shape, num_heads=1, head_k_dim=key, head_v_dim=value, query_scale=key**-0.5)


def gla_mapped_keys(shape: Any, factor: int) -> Any:
    return replace(shape, state_map=4, query_scale=(4 * shape.head_k_dim) ** -0.5)


def gla_longer_keys(shape: Any, factor: int) -> Any:
    """K -> factor*K. The query scale stays: new queries are zero, so old ones must count as before."""
    return replace(shape, head_k_dim=factor * shape.head_k_dim)


def gla_merge(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    return {GATED_NORM: old[GATED_NORM].repeat(step.old.num_heads)}


def gla_fresh_qkv(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    fresh = {name: draw.xavier_uniform(old[name].shape, GLA_GAIN, old[name]) for name in GLA_QKV_GATE}
    fresh["gk_proj.1.bias"] = torch.zeros_like(old["gk_proj.1.bias"])
    return fresh | gla_merge(old, step, config, draw)


def gla_fresh(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    fresh = gla_fresh_qkv(old, step, config, draw)
    for name in ("g_proj.weight", "o_proj.weight"):
        fresh[name] = draw.xavier_uniform(old[name].shape, GLA_GAIN, old[name])
    fresh[GATED_NORM] = torch.ones_like(fresh[GATED_NORM])
    return fresh | fresh_norm(old, step, config)


def fresh_norm(tensors: Tensors, step: LayerPlan, config: Any) -> Tensors:
    return {NORM + "weight": torch.ones_like(tensors[NORM + "weight"])}


def gla_maps(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    shape = (step.old.num_heads, step.old.head_k_dim, 4 * step.old.head_k_dim)
    like = old["q_proj.weight"]
    return {name: draw.xavier_normal(shape, 0.5, like) for name in ("q_map", "k_map", "gk_map")}


def gla_extend(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    heads, key = step.old.num_heads, step.old.head_k_dim
    factor = step.new.head_k_dim // key

    def per_head(name: str) -> Tensor:
        return old[name].unflatten(0, (heads, key))  # [H, K, ...]

    q, k = per_head("q_proj.weight"), per_head("k_proj.weight")
    new_rows = draw.xavier_uniform((heads * (factor - 1) * key, k.shape[-1]), GLA_GAIN, k).unflatten(
        0, (heads, -1)
    )
    grown = {
        "q_proj.weight": torch.cat([q, torch.zeros_like(new_rows)], dim=1),
        "k_proj.weight": torch.cat([k, new_rows], dim=1),
        "gk_proj.1.weight": per_head("gk_proj.1.weight").repeat(1, factor, 1),
        "gk_proj.1.bias": per_head("gk_proj.1.bias").repeat(1, factor),
    }
    return {name: tensor.flatten(0, 1) for name, tensor in grown.items()}


register_modes(
    "gla",
    {
        "gla": Mode(gla_one_head, gla_fresh),
        "merge": Mode(gla_one_head, gla_merge, published=fresh_norm),
        "qk_gla": Mode(gla_one_head, gla_fresh_qkv),
        "lora_4": Mode(gla_mapped_keys, gla_maps),
        "extend": Mode(gla_longer_keys, gla_extend, factors=(2, 4, 8)),
    },
    default="gla",
)

# ----------------------------------------------------------------------------------------------------
# modes of Mamba2: the state is [H, P, N]; in_proj holds rows z, x, B, C, dt, conv1d channels x, B, C, and
# B and C have N rows a group

# (tensor name, its rows of B or C [G, N, ...], new N) -> the grown rows [G, new N, ...]
Grow = Callable[[str, Tensor, int], Tensor]


def mamba2_state(times: int | None = None) -> Callable[[Any, int], Any]:
    return lambda shape, factor: replace(shape, state_size=(times or factor) * shape.state_size)


def mamba2_mapped_keys(shape: Any, factor: int) -> Any:
    return replace(shape, state_map=4)


def grow_rows(old: Tensors, step: LayerPlan, config: Any, grow_B: Grow, grow_C: Grow) -> Tensors:
    """The tensors that hold rows of B and C, with these rows grown inside each group."""
    inner, rows = config.num_heads * config.head_dim, config.n_groups * step.old.state_size
    grown = {}
    for name in ("in_proj.weight", "in_proj.bias", "conv1d.weight", "conv1d.bias"):
        if name not in old:  # both biases are optional
            continue
        before, after = (2 * inner, config.num_heads) if name.startswith("in_proj") else (inner, 0)
        rest, B, C, dt = old[name].split([before, rows, rows, after])
        B, C = (part.unflatten(0, (config.n_groups, -1)) for part in (B, C))  # [G, N, ...]
        B, C = (grow(name, part, step.new.state_size) for part, grow in ((B, grow_B), (C, grow_C)))
        grown[name] = torch.cat([rest, B.flatten(0, 1), C.flatten(0, 1), dt])
    return grown


def tiled(name: str, rows: Tensor, size: int) -> Tensor:
    return torch.cat([rows] * (size // rows.shape[1]), dim=1)


def padded(name: str, rows: Tensor, size: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(rows.shape[0], size - rows.shape[1], *rows.shape[2:])], dim=1)


def fresh_rows(config: Any, draw: Draw) -> Grow:
    def grow(name: str, rows: Tensor, size: int) -> Tensor:
        fan_in = config.hidden_size if name.startswith("in_proj") else config.conv_kernel
        return draw.linear((rows.shape[0], size, *rows.shape[2:]), fan_in, rows)

    return grow


def mamba2_fresh(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    fresh = fresh_rows(config, draw)
    decay = fresh_decay(old["dt_bias"], old["A_log"], config, draw)
    rows = grow_rows(old, step, config, fresh, fresh)
    return rows | decay | {"norm.weight": torch.ones_like(old["norm.weight"])}


def mamba2_published_reset(tensors: Tensors, step: LayerPlan, config: Any) -> Tensors:
    """A = 1 .. H and dt_bias = 1. With softplus(1) * A a state forgets within a token: not the default."""
    A = torch.arange(1, config.num_heads + 1, dtype=torch.float32)
    return {
        "A_log": A.log().to(tensors["A_log"]),
        "dt_bias": torch.ones_like(tensors["dt_bias"]),
        "norm.weight": torch.ones_like(tensors["norm.weight"]),
    }


def mamba2_copy(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    """As published: multiplies what is read from the state by 4."""
    return grow_rows(old, step, config, tiled, tiled)


def mamba2_zero(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    """As published: new B and new C are both zero, a saddle that no gradient leaves."""
    return grow_rows(old, step, config, padded, padded)


def mamba2_extend(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    fresh = fresh_rows(config, draw)

    def audible(name: str, rows: Tensor, size: int) -> Tensor:
        return torch.cat([rows, fresh(name, rows, size - rows.shape[1])], dim=1)

    def silent(name: str, rows: Tensor, size: int) -> Tensor:
        # a zero input of the convolution silences a new C row; zero weights there too would be a saddle
        return audible(name, rows, size) if name == "conv1d.weight" else padded(name, rows, size)

    return grow_rows(old, step, config, audible, silent)


def mamba2_maps(old: Tensors, step: LayerPlan, config: Any, draw: Draw) -> Tensors:
    N, like = step.old.state_size, old["in_proj.weight"]
    weights = {f"{side}_map.weight": draw.xavier_normal((4 * N, N), 0.5, like) for side in "BC"}
    return weights | {f"{side}_map.bias": like.new_zeros(4 * N) for side in "BC"}


register_modes(
    "mamba2",
    {
        "mamba2": Mode(mamba2_state(times=2), mamba2_fresh, published=mamba2_published_reset),
        "mamba4": Mode(mamba2_state(times=4), mamba2_fresh, published=mamba2_published_reset),
        "merge_copy": Mode(mamba2_state(times=4), mamba2_copy, published=mamba2_published_reset),
        "merge_zero": Mode(mamba2_state(times=4), mamba2_zero, published=mamba2_published_reset),
        "lora_4": Mode(mamba2_mapped_keys, mamba2_maps),
        "extend": Mode(mamba2_state(), mamba2_extend, factors=(2, 4, 8)),
    },
    default="mamba4",
)

if __name__ == "__main__":
    from .expansion_command import main

    raise SystemExit(main())
