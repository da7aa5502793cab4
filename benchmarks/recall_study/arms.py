"""What a base is post-trained as: `LPT`, or a drop_mode with its reinit and drop_prop."""

from dataclasses import dataclass

from torch import nn

from models import expand_state
from models.report import ExpansionReport

from .settings import Settings

CONTROL = "LPT"
NOTHING = "base"  # the base as it is: it costs no run


@dataclass(frozen=True)
class Arm:
    """Written `mode[:published][/prop N]`; without a mode nothing is expanded."""

    mode: str | None
    reinit: str = "standard"
    drop_prop: int | None = None  # None: the study's own

    @property
    def name(self) -> str:
        if self.mode is None:
            return CONTROL
        reinit = "" if self.reinit == "standard" else f":{self.reinit}"
        return f"{self.mode}{reinit}" + (f"/prop{self.drop_prop}" if self.drop_prop else "")


def parse_arm(text: str) -> Arm:
    """The arm that has this name."""
    if text == CONTROL:
        return Arm(None)
    rest, _, prop = text.partition("/prop")
    mode, _, reinit = rest.partition(":")
    return Arm(mode, reinit or "standard", int(prop) if prop else None)


def main_arms(settings: Settings, family: str) -> list[Arm]:
    return [parse_arm(text) for text in settings.arms[family]]


def sweep_arms(settings: Settings, best: list[str]) -> list[Arm]:
    """The best arms again with the other drop_prop."""
    arms = [parse_arm(name) for name in best]
    return [Arm(a.mode, a.reinit, prop) for a in arms for prop in other_props(settings)]


def other_props(settings: Settings) -> list[int]:
    """What the sweep adds to the drop_prop (or the layers) of all arms."""
    return [prop for prop in settings.sweep if settings.layers or prop != settings.drop_prop]


def expand(model: nn.Module, arm: Arm, settings: Settings, seed: int) -> ExpansionReport | None:
    """Expand `model` in place as the arm says. Raises ValueError for what the family does not know."""
    if arm.mode is None:
        return None
    which = {"drop_prop": arm.drop_prop or settings.drop_prop}
    if settings.layers and arm.drop_prop is None:
        which = {"layers": settings.layers}
    return expand_state(model, **which, drop_mode=arm.mode, seed=seed, reinit=arm.reinit)
