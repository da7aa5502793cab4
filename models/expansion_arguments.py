"""Which layers and which factor were asked for, checked before anything is done."""

from collections.abc import Iterable
from numbers import Integral
from typing import Any

DEFAULT_FACTOR = 4


def choose_factor(drop_mode: str, allowed: tuple[int, ...], expand_factor: int | None) -> int:
    """The growth factor. `allowed` is empty for modes that fix their own, where giving one is an error."""
    if expand_factor is None:
        return DEFAULT_FACTOR
    if not allowed:
        raise ValueError(
            f"expand_factor={expand_factor!r} was given, but drop_mode={drop_mode!r} fixes its own factor; "
            "leave it out"
        )
    if not _is_int(expand_factor) or expand_factor not in allowed:
        raise ValueError(f"expand_factor={expand_factor!r} must be one of {', '.join(map(str, allowed))}")
    return int(expand_factor)


def choose_layers(num_layers: int, drop_prop: int | None, layers: Iterable[int] | None) -> list[int]:
    """The layers to expand, in order: those named, or every i with i % drop_prop == 0."""
    if (drop_prop is None) == (layers is None):
        problem = "neither was given" if drop_prop is None else "both were given"
        raise ValueError(
            f"give either drop_prop (layer i is expanded when i % drop_prop == 0) or layers; {problem}"
        )
    return _every(num_layers, drop_prop) if layers is None else _named(num_layers, layers)


def _every(num_layers: int, drop_prop: Any) -> list[int]:
    if not _is_int(drop_prop) or drop_prop < 1 or num_layers % drop_prop:
        divisors = ", ".join(str(n) for n in range(1, num_layers + 1) if num_layers % n == 0)
        raise ValueError(
            f"drop_prop={drop_prop!r} does not divide the {num_layers} layers; use one of {divisors}"
        )
    return list(range(0, num_layers, int(drop_prop)))


def _named(num_layers: int, layers: Any) -> list[int]:
    chosen = list(layers) if isinstance(layers, Iterable) and not isinstance(layers, str) else [layers]
    in_range = all(_is_int(layer) and 0 <= layer < num_layers for layer in chosen)
    if not chosen or not in_range or len(set(chosen)) != len(chosen):
        raise ValueError(f"layers={layers!r} must be distinct layer numbers from 0 to {num_layers - 1}")
    return sorted(map(int, chosen))


def _is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)  # NumPy's integers are Integral too
