"""From records to numbers by arm: nothing here formats or draws."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .arms import CONTROL, NOTHING, main_arms, parse_arm, sweep_arms
from .measure import mean_recall
from .settings import Settings, from_dict
from .statistics import Estimate, estimate, paired
from .store import Record

RECOVERED = 1.01  # text loss within 1 % of the base's
SATURATED = 0.95

Runs = dict[int, Record]  # by seed


@dataclass(frozen=True)
class FamilyResult:
    """Finished runs of one family. `arms` has the control first, then the order of the configuration."""

    family: str
    settings: Settings  # with what the family has of its own
    bases: Runs
    arms: dict[str, Runs]
    costs: dict[str, Record]
    best: tuple[str, ...]  # what the sweep followed

    def recall(self, arm: str, step: int | None = None) -> Estimate:
        """Mean recall at a step, None for the last one."""
        return estimate(list(self._values(arm, mean_recall, step).values()))

    def recall_at(self, arm: str, pairs: int) -> Estimate:
        return estimate(list(self._values(arm, lambda point: point["recall"][str(pairs)]).values()))

    def text_loss(self, arm: str) -> Estimate | None:
        values = [v for v in self._values(arm, _text_loss).values() if v is not None]
        return estimate(values) if values else None

    def gain(self, arm: str, step: int | None = None) -> Estimate | None:
        """Mean recall over the control's, paired by seed."""
        gains = self.gains(arm, step)
        return estimate(list(gains.values())) if gains else None

    def gains(self, arm: str, step: int | None = None) -> dict[int, float]:
        """What `gain` averages: seed -> mean recall over the control's, of the seeds that both have."""
        ours, control = self._values(arm, mean_recall, step), self._values(CONTROL, mean_recall, step)
        return {seed: ours[seed] - control[seed] for seed in sorted(set(ours) & set(control))}

    def text_cost(self, arm: str) -> Estimate | None:
        """Held-out text loss over the control's, paired by seed."""
        ours, control = (
            {seed: value for seed, value in self._values(name, _text_loss).items() if value is not None}
            for name in (arm, CONTROL)
        )
        return paired(ours, control)

    def steps(self) -> list[int]:
        """Steps at which every run of every arm was measured."""
        runs = [run for arm in self.arms.values() for run in arm.values()]
        steps = [{point["step"] for point in run["curve"]} for run in runs]
        return sorted(set.intersection(*steps)) if steps else []

    def recovery(self, arm: str) -> list[int | None]:
        """By seed, the first measured step from which the text loss stays within 1 % of the base's."""
        return [
            recovered_at(run["curve"], self.bases[seed]["curve"][-1]["text_loss"])
            for seed, run in sorted(self.arms[arm].items())
            if seed in self.bases
        ]

    def catches_up(self, arm: str) -> int | None:
        """The first step from which the mean recall stays at or above the control's; None: it does not."""
        return _first_lasting(self.steps(), lambda step: _mean(self.gain(arm, step)) >= 0)

    def _values(self, arm: str, read: Callable[[dict], Any], step: int | None = None) -> dict[int, Any]:
        runs = self.bases if arm == NOTHING else self.arms.get(arm, {})
        return {seed: read(_point(run["curve"], step)) for seed, run in runs.items()}

    def mixed_bases(self) -> bool:
        """Whether arms of one seed began from different weights (a base was lost and made again)."""
        by_seed: dict[int, set[str]] = {}
        for runs in self.arms.values():
            for seed, run in runs.items():
                by_seed.setdefault(seed, set()).add(run["weights"])
        return any(len(weights) > 1 for weights in by_seed.values())


def _point(curve: list[dict], step: int | None) -> dict:
    return curve[-1] if step is None else next(point for point in curve if point["step"] == step)


def _text_loss(point: Mapping[str, Any]) -> float | None:
    return point["text_loss"]


def _mean(value: Estimate | None) -> float:
    return float("-inf") if value is None else value.mean


def recovered_at(curve: list[dict], base_loss: float | None) -> int | None:
    if base_loss is None:
        return None
    losses = {point["step"]: point["text_loss"] for point in curve}
    return _first_lasting(
        sorted(losses), lambda step: losses[step] is not None and losses[step] <= RECOVERED * base_loss
    )


def _first_lasting(steps: list[int], holds: Callable[[int], bool]) -> int | None:
    first = None
    for step in reversed(steps):
        if not holds(step):
            break
        first = step
    return first


def settings_of(records: list[Record]) -> Settings:
    return from_dict(next(r["settings"] for r in records if r["kind"] == "settings"))


def family_results(records: list[Record]) -> list[FamilyResult]:
    """Results of one fingerprint's records; families without any arm are left out."""
    settings = settings_of(records)
    families = sorted({r["family"] for r in records if r["kind"] == "arm"})
    return [_family(settings, family, records) for family in families]


def _family(settings: Settings, family: str, records: list[Record]) -> FamilyResult:
    mine = [r for r in records if r.get("family") == family]
    arms: dict[str, Runs] = {}
    for record in mine:
        if record["kind"] == "arm":
            arms.setdefault(record["arm"], {})[record["seed"]] = record
    best = next((r["best"] for r in mine if r["kind"] == "choice"), [])
    order = [arm.name for arm in main_arms(settings, family)]
    order += [arm.name for arm in sweep_arms(settings.of(family), best)]
    order = [CONTROL, *(name for name in order if name != CONTROL)]
    ordered = {name: arms[name] for name in order if name in arms}
    return FamilyResult(
        family=family,
        settings=settings.of(family),
        bases={r["seed"]: r for r in mine if r["kind"] == "base"},
        arms=ordered | {name: runs for name, runs in sorted(arms.items()) if name not in ordered},
        costs={r["arm"]: r for r in mine if r["kind"] == "cost"},
        best=tuple(best),
    )


def verdicts(result: FamilyResult) -> dict[str, list[str]]:
    """Arms by the sign of their paired gain in recall: above, below, open (the interval holds 0)."""
    found: dict[str, list[str]] = {"above": [], "below": [], "open": []}
    for arm in result.arms:
        gain = None if arm == CONTROL else result.gain(arm)
        if gain is not None:
            found[{1: "above", -1: "below", 0: "open"}[gain.sign]].append(arm)
    return found


def recommended(result: FamilyResult) -> str | None:
    """The arm with the largest gain among those above the control whose text loss is not shown to be worse.

    Arms with layers of their own compete too.
    """
    above = verdicts(result)["above"]
    fair = [arm for arm in above if (cost := result.text_cost(arm)) is None or cost.sign <= 0]
    return max(fair, key=lambda arm: _mean(result.gain(arm)), default=None)


def expanded_of(result: FamilyResult, arm: str) -> str | None:
    """Which layers an arm expands, in words."""
    parsed = parse_arm(arm)
    if parsed.mode is None:
        return None
    which = parsed.selection(result.settings)
    if "drop_prop" in which:
        return f"drop_prop={which['drop_prop']}"
    layers = which["layers"]
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}"
