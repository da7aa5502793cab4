"""The registry of model families: everything outside a family's own file finds it here.

A family is one file of models/ that ends with `register_family(Family(...))`; models/__init__.py imports
every file that does.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

RawConfig = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """A model family and the layouts its checkpoints are published in.

    Attributes:
        name: what the rest of the code calls it, and the key of its expansion modes.
        config_class, model_class: ours.
        published_types: values of `model_type` in published config.json files that this family reads.
        read_config: published config.json -> keyword arguments of config_class.
        read_tensor: (stored name, tensor, config) -> our names and tensors; {} drops it.
        write_published: unexpanded model -> (config.json, tensors) in the published layout, if it has one.
        recognises: whether a config.json without `model_type` is one of the family's.
    """

    name: str
    config_class: type
    model_class: type
    published_types: tuple[str, ...] = ()
    read_config: Callable[[RawConfig], RawConfig] = dict
    read_tensor: Callable[[str, Tensor, Any], dict[str, Tensor]] = lambda name, tensor, config: {name: tensor}
    write_published: Callable[[Any], tuple[RawConfig, dict[str, Tensor]]] | None = None
    recognises: Callable[[RawConfig], bool] = lambda raw: False

    @property
    def model_type(self) -> str:
        return self.config_class.model_type


FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    FAMILIES[family.name] = family


def is_ours(config: Any) -> bool:
    """Whether a family reads it."""
    try:
        family_of(config)
    except ValueError:
        return False
    return True


def family_of(config: Any) -> Family:
    """Family of a config object, a model, or a config.json's dict (ours or published).

    Raises:
        ValueError: no family reads it.
    """
    config = getattr(config, "config", config)
    raw = config if isinstance(config, dict) else {"model_type": config.model_type}
    model_type = raw.get("model_type")
    for family in FAMILIES.values():
        if model_type in (family.model_type, *family.published_types):
            return family
        if model_type is None and family.recognises(raw):
            return family
    known = [name for family in FAMILIES.values() for name in (family.model_type, *family.published_types)]
    raise ValueError(f"model_type={model_type!r} belongs to no family; known are {', '.join(known)}")
