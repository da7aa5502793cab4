"""What an expansion mode is, and the table of modes of every family.

The modes of GLA and Mamba2 are in expansion.py. A family's own file adds its modes with `register_modes`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .draw import Draw

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class LayerPlan:
    """What one layer becomes; shapes are the family's own frozen dataclasses."""

    layer: int
    mode: str
    old: Any
    new: Any


@dataclass(frozen=True)
class Mode:
    """How a layer grows.

    reshape: (old shape, factor) -> new shape; ValueError when a layer of this shape cannot grow so.
    fill: (old layer's tensors by name, LayerPlan, config, Draw) -> the tensors that change.
    published: (new layer's tensors, LayerPlan, config) -> what reinit="published" resets besides.
    factors: what expand_factor may be; empty when the mode fixes the factor itself.
    """

    reshape: Callable[[Any, int], Any]
    fill: Callable[[Tensors, LayerPlan, Any, Draw], Tensors]
    published: Callable[[Tensors, LayerPlan, Any], Tensors] | None = None
    factors: tuple[int, ...] = ()


MODES: dict[str, dict[str, Mode]] = {}
DEFAULT_MODE: dict[str, str] = {}


def register_modes(family: str, table: dict[str, Mode], default: str | None = None) -> None:
    """Add modes to a family, named as in `register_family`; `default` is used when no mode is asked for."""
    MODES.setdefault(family, {}).update(table)
    DEFAULT_MODE[family] = default or DEFAULT_MODE.get(family) or next(iter(table))


def mode_name(family: str, drop_mode: str | None) -> str:
    """`drop_mode`, or the family's default for None; ValueError when the family has no such mode."""
    if family not in MODES:
        raise ValueError(
            f"the {family} family has no expansion modes; its file adds them with register_modes"
        )
    name = DEFAULT_MODE[family] if drop_mode is None else drop_mode
    if not isinstance(name, str) or name not in MODES[family]:
        modes = ", ".join(MODES[family])
        raise ValueError(f"drop_mode={name!r} is no mode of the {family} family; use one of {modes}")
    return name
