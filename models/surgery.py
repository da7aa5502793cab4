"""Exchange the token mixer of a block: the mechanics of state expansion, the same for every family."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

NORM = "mixer_norm."  # prefix of the norm in front of the mixer among a layer's tensors


@dataclass(frozen=True)
class Replacement:
    """A finished mixer for a block, and the parameters of the norm in front of it."""

    mixer: nn.Module
    norm: dict[str, nn.Parameter]


def layer_tensors(block: nn.Module) -> dict[str, Tensor]:
    """The parameters of a block's mixer, and of the norm in front of it under `NORM`, by name."""
    norm = {NORM + name: parameter for name, parameter in block.mixer_norm.named_parameters()}
    return dict(block.token_mixer.named_parameters()) | norm


def build_replacement(block: nn.Module, config: Any, layer: int, tensors: dict[str, Tensor]) -> Replacement:
    """A mixer of the shape in `config.layers[layer]` that holds `tensors`. The block stays as it is.

    Raises:
        ValueError: a tensor that the new mixer needs is missing or misshapen.
    """
    with torch.device("meta"):
        mixer = type(block.token_mixer)(config, layer)
    mixer.train(block.token_mixer.training)
    for name, empty in list(mixer.named_parameters()):
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != tuple(empty.shape):
            raise ValueError(f"layer {layer}: {name} is {found} but must be {tuple(empty.shape)}")
        owner, _, attribute = name.rpartition(".")
        setattr(mixer.get_submodule(owner), attribute, _as_parameter(tensors[name]))
    norm = {name: tensors[NORM + name] for name, _ in block.mixer_norm.named_parameters()}
    return Replacement(mixer, {name: _as_parameter(tensor) for name, tensor in norm.items()})


def put_in_place(block: nn.Module, new: Replacement) -> None:
    attribute = next(name for name, child in block.named_children() if child is block.token_mixer)
    setattr(block, attribute, new.mixer)
    for name, parameter in new.norm.items():
        setattr(block.mixer_norm, name, parameter)


def adopt_config(model: nn.Module, config: Any) -> None:
    """Give `config` to the model and to all its modules that hold the one it had."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config


def _as_parameter(tensor: Tensor) -> nn.Parameter:
    # an inherited tensor is the old Parameter itself: no copy, and bit-identical by construction
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
