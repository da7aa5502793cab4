"""What a base is post-trained as: `LPT`, or a drop_mode with its reinit, and layers of its own."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from models import build_model, expand_state
from models.report import ExpansionReport

from .settings import Settings

CONTROL = "LPT"
NOTHING = "base"  # the base as it is: it costs no run


@dataclass(frozen=True)
class Arm:
    """Written `mode[:published][/propN]` or `mode[:published]/layerN`; without a mode nothing is expanded."""

    mode: str | None
    reinit: str = "standard"
    drop_prop: int | None = None
    layer: int | None = None  # where both are None, the study's layers or drop_prop

    @property
    def name(self) -> str:
        if self.mode is None:
            return CONTROL
        reinit = "" if self.reinit == "standard" else f":{self.reinit}"
        return f"{self.mode}{reinit}" + (f"/{self.where}" if self.where else "")

    @property
    def where(self) -> str:
        """Which layers, where the study's own are not meant."""
        if self.layer is not None:
            return f"layer{self.layer}"
        return "" if self.drop_prop is None else f"prop{self.drop_prop}"

    def selection(self, settings: Settings) -> dict[str, Any]:
        """The arguments of expand_state that choose the layers."""
        if self.layer is not None:
            return {"layers": (self.layer,)}
        if self.drop_prop is None and settings.layers:
            return {"layers": settings.layers}
        return {"drop_prop": self.drop_prop or settings.drop_prop}


def parse_arm(text: str) -> Arm:
    """The arm that has this name."""
    if text == CONTROL:
        return Arm(None)
    rest, _, where = text.partition("/")
    mode, _, reinit = rest.partition(":")
    arm = Arm(mode, reinit or "standard")
    if "/" not in text:
        return arm
    for key, field in (("prop", "drop_prop"), ("layer", "layer")):
        if where.startswith(key) and where.removeprefix(key).isdecimal():
            return replace(arm, **{field: int(where.removeprefix(key))})
    raise ValueError(f"arm {text}: expected MODE, MODE/propN or MODE/layerN, MODE with :published or not")


def main_arms(settings: Settings, family: str) -> list[Arm]:
    return [parse_arm(text) for text in settings.arms[family]]


def sweep_arms(settings: Settings, best: list[str]) -> list[Arm]:
    """The best arms again with the other drop_prop."""
    arms = [parse_arm(name) for name in best]
    return [Arm(a.mode, a.reinit, prop) for a in arms for prop in other_props(settings)]


def other_props(settings: Settings) -> list[int]:
    """What the sweep adds to the drop_prop (or the layers) of all arms."""
    return [prop for prop in settings.sweep if settings.layers or prop != settings.drop_prop]


def check_arms(settings: Settings) -> None:
    """Raises ValueError for an arm that cannot be built, before anything is trained for it."""
    for family in settings.families:
        own = settings.of(family)
        for arm in main_arms(own, family):
            try:
                expand(build_model(own.models[family] | {"vocab_size": 1}, device="meta"), arm, own, seed=0)
            except ValueError as error:
                raise ValueError(f"arms.{family}={arm.name}: {error}") from None


def expand(model: nn.Module, arm: Arm, settings: Settings, seed: int) -> ExpansionReport | None:
    """Expand `model` in place as the arm says. Raises ValueError for what the family does not know."""
    if arm.mode is None:
        return None
    return expand_state(model, **arm.selection(settings), drop_mode=arm.mode, seed=seed, reinit=arm.reinit)
