"""The layouts in which Mamba2 checkpoints are published: transformers', and that of state-spaces/mamba2-*."""

import math
from typing import Any

from torch import Tensor

from .config import check_value

PUBLISHED_FIELDS = (
    *(
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_heads",
        "head_dim",
        "state_size",
        "expand",
        "n_groups",
    ),
    *("conv_kernel", "use_bias", "use_conv_bias", "layer_norm_epsilon", "residual_in_fp32", "chunk_size"),
    *("time_step_min", "time_step_max", "time_step_floor", "time_step_limit"),
    *("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id"),
)
# transformers' defaults where they differ from ours: a config.json may leave them out
TRANSFORMERS_DEFAULTS = {
    **{"num_heads": 128, "vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "n_groups": 8},
    **{"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
}


def read_config(raw: dict[str, Any]) -> dict[str, Any]:
    if is_original(raw):
        return read_original_config(raw)
    known = (*PUBLISHED_FIELDS, "hidden_act")
    return TRANSFORMERS_DEFAULTS | {name: raw[name] for name in known if name in raw}


def is_original(raw: dict[str, Any]) -> bool:
    return "d_model" in raw and "n_layer" in raw


def read_original_config(raw: dict[str, Any]) -> dict[str, Any]:
    """The config.json of state-spaces/mamba2-*, with mamba_ssm's defaults where it is silent.

    Raises:
        ValueError: names the field that is no size, or asks for something else than plain Mamba2 layers.
    """
    ssm = raw.get("ssm_cfg") or {}
    check_value("Mamba2: ssm_cfg", ssm, dict)
    d_model, expand, head_dim = raw["d_model"], ssm.get("expand", 2), ssm.get("headdim", 64)
    vocab_size, multiple = raw.get("vocab_size", 50277), raw.get("pad_vocab_size_multiple", 8)
    sizes = {"d_model": d_model, "vocab_size": vocab_size, "pad_vocab_size_multiple": multiple}
    for name, value in (sizes | {"ssm_cfg.expand": expand, "ssm_cfg.headdim": head_dim}).items():
        check_value(f"Mamba2: {name}", value, int)
    needed = {
        "ssm_cfg.layer": (ssm.get("layer", "Mamba1"), "Mamba2"),
        "d_intermediate": (raw.get("d_intermediate", 0), 0),
        "attn_layer_idx": (raw.get("attn_layer_idx") or [], []),
        "rms_norm": (raw.get("rms_norm", True), True),
        "ssm_cfg.rmsnorm": (ssm.get("rmsnorm", True), True),
        "ssm_cfg.norm_before_gate": (ssm.get("norm_before_gate", False), False),
        "ssm_cfg.D_has_hdim": (ssm.get("D_has_hdim", False), False),
        "ssm_cfg.d_ssm": (ssm.get("d_ssm") or expand * d_model, expand * d_model),
    }
    for name, (value, supported) in needed.items():
        if value != supported:
            raise ValueError(f"Mamba2: {name}={value!r} is not supported; expected {supported!r}")
    return {
        "vocab_size": -(-vocab_size // multiple) * multiple,
        "hidden_size": d_model,
        "num_hidden_layers": raw["n_layer"],
        "num_heads": expand * d_model // head_dim,
        "head_dim": head_dim,
        "state_size": ssm.get("d_state", 128),
        "expand": expand,
        "n_groups": ssm.get("ngroups", 1),
        "conv_kernel": ssm.get("d_conv", 4),
        "use_bias": ssm.get("bias", False),
        "use_conv_bias": ssm.get("conv_bias", True),
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "chunk_size": ssm.get("chunk_size", 256),
        "time_step_min": ssm.get("dt_min", 0.001),
        "time_step_max": ssm.get("dt_max", 0.1),
        "time_step_floor": ssm.get("dt_init_floor", 1e-4),
        "time_step_limit": ssm.get("dt_limit"),
        "tie_word_embeddings": raw.get("tie_embeddings", True),
        # GPT-NeoX-20B's tokenizer: <|endoftext|> is 0
        **{"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0},
    }


def time_step_limit(value: Any) -> list[float]:
    """[low, high] from None, a pair of numbers or their names, or transformers' {"__float__": "Infinity"}.

    Raises:
        ValueError: it is none of these, or not a rising pair.
    """
    if value is None:
        return [0.0, math.inf]
    try:
        low, high = (float(v["__float__"] if isinstance(v, dict) else v) for v in value)
    except (TypeError, ValueError, KeyError):
        low, high = math.nan, math.nan
    if not 0 <= low < high:
        raise ValueError(f"time_step_limit={value!r} must be a pair [low, high] with 0 <= low < high")
    return [low, high]


def read_tensor(name: str, tensor: Tensor, config: Any) -> dict[str, Tensor]:
    """Published name -> ours: the original layout has `embedding` where transformers has `embeddings`."""
    return {name.replace("backbone.embedding.", "backbone.embeddings."): tensor}


def write_published(model: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {name: getattr(model.config, name) for name in PUBLISHED_FIELDS}
    low, high = model.config.time_step_limit
    config["time_step_limit"] = [low, {"__float__": "Infinity"} if math.isinf(high) else high]
    config |= {"model_type": "mamba2", "architectures": ["Mamba2ForCausalLM"], "hidden_act": "silu"}
    # where this is true, transformers (5.23) divides the out_proj that it has just loaded by sqrt(layers)
    config["rescale_prenorm_residual"] = False
    return config, model.state_dict()
