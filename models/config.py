"""What the config.json of every family holds: above all `layers`, each layer's shape by itself.

`layers[i]` is a dict with the fields of the family's `shape_class`, so that a model with a few expanded
layers is rebuilt from its config alone. Without `layers` all layers have the shape that the published fields
describe.
"""

import math
import types
import typing
from dataclasses import asdict, fields
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig

TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")  # 0 is one, and some published files hold -1
EXPECTED = {
    int: "a positive whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    list: "a list",
    types.NoneType: "null",
}


class LanguageModelConfig(PreTrainedConfig):
    """Fields of every family.

    A family adds its published fields, among them (or by attribute_map) `norm_eps`. Every field, and every
    entry of `layers`, must have the annotated type; whole numbers are sizes, so that they start at 1.
    """

    shape_class: ClassVar[type]  # frozen dataclass: one layer's shape
    unsupported: ClassVar[dict[str, tuple]] = {}  # published field: values that mean "not used"

    vocab_size: int = 32000
    hidden_size: int = 2048
    num_hidden_layers: int = 24
    layers: list | None = None
    residual_in_fp32: bool = False  # the residual stream in at least fp32, whatever the compute dtype
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, unused in self.unsupported.items():
            value = kwargs.pop(name, unused[0])
            if value not in unused:
                raise ValueError(
                    f"{type(self).__name__}: {name}={value!r} is not supported; expected {unused[0]!r}"
                )
        super().__post_init__(**kwargs)
        self.check()
        if self.layers is None:
            self.layers = [asdict(self.uniform_shape()) for _ in range(self.num_hidden_layers)]
        if len(self.layers) != self.num_hidden_layers:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers}, but layers describes {len(self.layers)} layers"
            )
        for index in range(self.num_hidden_layers):
            self.layer_shape(index)

    def layer_shape(self, index: int) -> Any:
        """Shape of one layer, as a `shape_class`. Raises ValueError when the entry is not one."""
        entry, known = self.layers[index], [field.name for field in fields(self.shape_class)]
        try:
            shape = self.shape_class(**entry)
        except TypeError:
            found = f"has the keys {list(entry)}" if isinstance(entry, dict) else f"is {entry!r}"
            raise ValueError(f"layers[{index}] {found}; expected a dict with {known}") from None
        for field in fields(shape):
            check_value(f"layers[{index}].{field.name}", getattr(shape, field.name), field.type)
        return shape

    def expanded_layers(self) -> list[int]:
        """Layers whose shape is not the one that the published fields describe."""
        uniform = self.uniform_shape()
        return [index for index in range(self.num_hidden_layers) if self.layer_shape(index) != uniform]

    def uniform_shape(self) -> Any:
        """The shape of every layer before any expansion, from the published fields."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError for fields of a wrong type, or that do not fit together."""
        inherited = {field.name for field in fields(PreTrainedConfig)} | set(TOKEN_IDS)
        for field in fields(self):
            if field.name not in inherited:
                check_value(f"{type(self).__name__}: {field.name}", getattr(self, field.name), field.type)
        if self.norm_eps < 0:
            raise ValueError(f"{type(self).__name__}: norm_eps={self.norm_eps} must not be negative")


def check_value(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError unless `value` is of the annotated type; a whole number must be at least 1."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if not any(_is_a(value, kind) for kind in kinds):
        expected = " or ".join(EXPECTED.get(kind, getattr(kind, "__name__", str(kind))) for kind in kinds)
        raise ValueError(f"{name}={value!r} must be {expected}")


def _is_a(value: Any, kind: Any) -> bool:
    if kind is Any:
        return True
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if kind is float:  # JSON does not tell 1 from 1.0
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, typing.get_origin(kind) or kind)
