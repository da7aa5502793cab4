"""Tiny models of both families for the expansion tests, with no parameter at a special value."""

import torch
from torch import nn

from models.gla import GLAConfig, GLAForCausalLM
from models.mamba2 import Mamba2Config, Mamba2ForCausalLM

GLA_MODES = ("gla", "merge", "qk_gla", "lora_4", "extend")
MAMBA2_MODES = ("mamba2", "mamba4", "merge_copy", "merge_zero", "lora_4", "extend")
ALL_MODES = [("gla", mode) for mode in GLA_MODES] + [("mamba2", mode) for mode in MAMBA2_MODES]
VOCABULARY = 61


def tiny_config(family: str, **changes):
    if family == "gla":
        sizes = {"hidden_size": 32, "num_heads": 2, "intermediate_size": 40}
        return GLAConfig(**{"vocab_size": VOCABULARY, "num_hidden_layers": 4, **sizes, **changes})
    sizes = {
        "hidden_size": 16,
        "num_heads": 4,
        "head_dim": 8,
        "state_size": 6,
        "n_groups": 2,
        "use_bias": True,
    }
    return Mamba2Config(**{"vocab_size": VOCABULARY, "num_hidden_layers": 4, **sizes, **changes})


def tiny(family: str, seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A model whose norms, biases and decays are perturbed too, so that a tensor which is reset shows."""
    model_class = GLAForCausalLM if family == "gla" else Mamba2ForCausalLM
    model = model_class(tiny_config(family, **changes))
    model.initialize(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


def tokens(batch: int = 2, length: int = 19) -> torch.Tensor:
    return torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(7))


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
