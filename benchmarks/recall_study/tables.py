"""The tables of docs/results.md, as Markdown."""

from collections.abc import Sequence

from .arms import CONTROL, NOTHING
from .statistics import Estimate, estimate
from .summary import FamilyResult, expanded_of

NO_VALUE = "-"


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first one the header."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]])


def number(value: Estimate | None, digits: int = 3, sign: bool = False) -> str:
    """`0.412 ± 0.020`; without interval for one seed."""
    if value is None:
        return NO_VALUE
    mean = f"{value.mean:+.{digits}f}" if sign else f"{value.mean:.{digits}f}"
    return mean if value.half is None else f"{mean} ± {value.half:.{digits}f}"


def _bold(text: str, value: Estimate | None) -> str:
    return f"**{text}**" if value is not None and value.sign else text


def end_table(result: FamilyResult) -> str:
    """An arm a row: recall and text loss at the end, and both against the control, paired by seed."""
    head = ["arm", "expanded", "state", "seeds", "mean recall", "over LPT", "text loss", "over LPT"]
    rows = [head]
    if result.bases:
        base = next(iter(result.bases.values()))
        shown = [number(result.recall(NOTHING)), NO_VALUE, number(result.text_loss(NOTHING)), NO_VALUE]
        rows.append(
            [
                "base, no post-training",
                NO_VALUE,
                f"{base['state_elements']:,}",
                str(len(result.bases)),
                *shown,
            ]
        )
    for arm, runs in result.arms.items():
        gain, cost = (None, None) if arm == CONTROL else (result.gain(arm), result.text_cost(arm))
        shown = [
            number(result.recall(arm)),
            _bold(number(gain, sign=True), gain),
            number(result.text_loss(arm)),
            _bold(number(cost, sign=True), cost),
        ]
        state = f"{next(iter(runs.values()))['state_elements']:,}"
        rows.append([f"`{_short(arm)}`", expanded_of(result, arm) or NO_VALUE, state, str(len(runs)), *shown])
    return markdown(rows)


def _short(arm: str) -> str:
    return arm.partition("/")[0]


def pairs_table(result: FamilyResult) -> str:
    """Recall at the end by number of pairs."""
    pairs = result.settings.eval_pairs
    rows = [["arm", *(f"{n} pairs" for n in pairs)]]
    arms = ([NOTHING] if result.bases else []) + list(result.arms)
    for arm in arms:
        rows.append([f"`{arm}`", *(number(result.recall_at(arm, n), 2) for n in pairs)])
    return markdown(rows)


def seeds_table(result: FamilyResult) -> str:
    """Gain in mean recall over the control by seed, and over those whose base had learned the task."""
    s, seeds = result.settings, sorted(result.bases)
    fewest = min(s.eval_pairs)
    known = {seed: result.bases[seed]["curve"][-1]["recall"][str(fewest)] for seed in seeds}
    rows = [["", *(f"seed {seed}" for seed in seeds), f"where the base has {s.plateau_learned} or more"]]
    shares = (f"{known[seed]:.3f}" for seed in seeds)
    rows.append([f"base, recall at {fewest} pairs", *shares, NO_VALUE])
    for arm in result.arms:
        if arm != CONTROL:
            gains = result.gains(arm)
            shown = (f"{gains[seed]:+.3f}" if seed in gains else NO_VALUE for seed in seeds)
            learned = [gain for seed, gain in gains.items() if known.get(seed, 0) >= s.plateau_learned]
            mean = estimate(learned) if learned else None
            rows.append([f"`{arm}`", *shown, _bold(number(mean, sign=True), mean)])
    return markdown(rows)


def along_table(result: FamilyResult) -> str:
    """Mean recall along post-training, and where an arm catches up with the control."""
    steps = _some(result.steps())
    rows = [["arm", *(f"step {step}" for step in steps), "at or above LPT from step"]]
    for arm in result.arms:
        means = [f"{result.recall(arm, step).mean:.3f}" for step in steps]
        since = None if arm == CONTROL else result.catches_up(arm)
        last = NO_VALUE if arm == CONTROL else "never" if since is None else str(since)
        rows.append([f"`{arm}`", *means, last])
    return markdown(rows)


def _some(steps: list[int], most: int = 7) -> list[int]:
    """About `most` of the steps, first and last among them, evenly spread over the run."""
    if len(steps) <= most:
        return steps
    targets = [steps[-1] * i / (most - 1) for i in range(most)]
    return sorted({min(steps, key=lambda step: abs(step - target)) for target in targets})


def cost_table(result: FamilyResult) -> str:
    """Recovery of the base's text loss, and what an arm costs."""
    rows = [
        ["arm", "steps to the base's text loss + 1 %", "parameters", "tokens/s", "peak GB", "runs diverged"]
    ]
    for arm, runs in result.arms.items():
        first, cost = next(iter(runs.values())), result.costs.get(arm)
        rate = f"{cost['tokens_per_second']:,}" if cost else NO_VALUE
        peak = f"{cost['peak_gb']:.2f}" if cost and cost["peak_gb"] else NO_VALUE
        diverged = sum(run["diverged"] for run in runs.values())
        rows.append(
            [
                f"`{arm}`",
                _recovery(result.recovery(arm)),
                f"{first['parameters']:,}",
                rate,
                peak,
                str(diverged),
            ]
        )
    return markdown(rows)


def _recovery(steps: list[int | None]) -> str:
    """Of each seed; the median would hide those that never recover."""
    return ", ".join("not" if step is None else str(step) for step in steps) or NO_VALUE


def base_table(result: FamilyResult) -> str:
    """The bases: did recall reach its plateau."""
    rows = [
        [
            "seed",
            "steps before the decay",
            "plateau reached",
            "last gain in mean recall",
            "mean recall",
            "text loss",
        ]
    ]
    for seed, run in sorted(result.bases.items()):
        plateau, last = run["plateau"], run["curve"][-1]
        gain = (
            NO_VALUE
            if plateau["gain"] is None
            else f"{plateau['gain']:+.4f} over {plateau['over_steps']} steps"
        )
        recall = sum(last["recall"].values()) / len(last["recall"])
        reached = "yes" if plateau["reached"] else "no: steps were up"
        rows.append([str(seed), str(plateau["step"]), reached, gain, f"{recall:.3f}", f"{last['text_loss']}"])
    return markdown(rows)
