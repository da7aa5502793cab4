"""What the config.json of every family holds: above all `layers`, each layer's shape by itself.

`layers[i]` is a dict with the fields of the family's `shape_class`, so that a model with a few expanded
layers is rebuilt from its config alone. Without `layers` all layers have the shape that the published fields
describe.
"""

from dataclasses import asdict, fields
from typing import Any, ClassVar

from transformers.configuration_utils import PreTrainedConfig


class LanguageModelConfig(PreTrainedConfig):
    """Fields of every family.

    A family adds its published fields, among them (or by attribute_map) `norm_eps`.
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
            return self.shape_class(**entry)
        except TypeError:
            raise ValueError(f"layers[{index}] has the keys {sorted(entry)}; expected {known}") from None

    def expanded_layers(self) -> list[int]:
        """Layers whose shape is not the one that the published fields describe."""
        uniform = self.uniform_shape()
        return [index for index in range(self.num_hidden_layers) if self.layer_shape(index) != uniform]

    def uniform_shape(self) -> Any:
        """The shape of every layer before any expansion, from the published fields."""
        raise NotImplementedError

    def check(self) -> None:
        """Raises ValueError for fields that do not fit together."""
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{type(self).__name__}: {name}={value!r} must be a positive integer")
