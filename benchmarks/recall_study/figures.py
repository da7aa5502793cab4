"""Pictures of a family: recall and text loss along post-training, recall by pairs, gain over the control."""

from pathlib import Path
from typing import Any

from .arms import CONTROL, NOTHING
from .measure import mean_recall
from .statistics import Estimate, estimate
from .summary import FamilyResult


def draw_all(result: FamilyResult, folder: Path, stem: str) -> list[Path]:
    """PNG files in `folder`, named after `stem`."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"along": draw_along, "pairs": draw_pairs, "gain": draw_gain}
    files = []
    for name, draw in pictures.items():
        file = folder / f"{stem}-{result.family}-{name}.png"
        _save(draw, result, file)
        files.append(file)
    return files


def _save(draw: Any, result: FamilyResult, file: Path) -> None:
    from matplotlib import pyplot

    figure = draw(result)
    # no date or version inside: the same records make the same file
    figure.savefig(file, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def _style(index: int) -> dict[str, Any]:
    from matplotlib import pyplot

    if index == 0:
        return {"color": "black", "linestyle": "--"}
    colours = pyplot.get_cmap("tab10").colors
    return {"color": colours[(index - 1) % 10], "linestyle": "-" if index <= 10 else ":"}


def draw_along(result: FamilyResult) -> Any:
    """Mean recall and text loss against the step of post-training, with 95 % bands."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    steps = result.steps()
    for index, (arm, runs) in enumerate(result.arms.items()):
        style = _style(index)
        for axis, read in ((axes[0], mean_recall), (axes[1], lambda point: point["text_loss"])):
            estimates = [_at(runs, step, read) for step in steps]
            _band(axis, steps, estimates, arm, style)
    axes[0].set(xlabel="post-training step", ylabel="mean recall over the test sizes")
    axes[1].set(xlabel="post-training step", ylabel="held-out text loss (nats/token)")
    axes[1].set_ylim(top=_upper(result))
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    return figure


def _at(runs: dict[int, dict], step: int, read: Any) -> Estimate | None:
    points = [point for run in runs.values() for point in run["curve"] if point["step"] == step]
    values = [value for value in map(read, points) if value is not None]
    return estimate(values) if values else None


def _band(axis: Any, steps: list[int], estimates: list[Estimate | None], label: str, style: dict) -> None:
    known = [(step, e) for step, e in zip(steps, estimates) if e is not None]
    axis.plot([step for step, _ in known], [e.mean for _, e in known], label=label, linewidth=1.3, **style)
    wide = [(step, e) for step, e in known if e.half is not None]
    low, high = ([getattr(e, side) for _, e in wide] for side in ("low", "high"))
    axis.fill_between([step for step, _ in wide], low, high, color=style["color"], alpha=0.12, linewidth=0)


def _upper(result: FamilyResult) -> float | None:
    """A reset layer begins far above: the axis shows where the arms differ."""
    bases = [run["curve"][-1]["text_loss"] for run in result.bases.values()]
    known = [loss for loss in bases if loss is not None]
    return 1.35 * max(known) if known else None


def draw_pairs(result: FamilyResult) -> Any:
    """Recall at the end against the number of pairs."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    pairs = list(result.settings.eval_pairs)
    if result.bases:
        means = [result.recall_at(NOTHING, n).mean for n in pairs]
        axis.plot(pairs, means, color="grey", linewidth=3, alpha=0.4, label="base")
    for index, arm in enumerate(result.arms):
        estimates = [result.recall_at(arm, n) for n in pairs]
        errors = [e.half or 0.0 for e in estimates]
        means = [e.mean for e in estimates]
        axis.errorbar(pairs, means, errors, marker=".", capsize=2, linewidth=1.2, label=arm, **_style(index))
    axis.set_xscale("log", base=2)
    axis.set_xticks(pairs, [str(n) for n in pairs])
    axis.set(xlabel="pairs to remember", ylabel="share of questions answered", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    return figure


def draw_gain(result: FamilyResult) -> Any:
    """Gain in recall over the control, paired by seed: mean, 95 % interval, and every seed."""
    from matplotlib import pyplot

    arms = [arm for arm in result.arms if arm != CONTROL and result.gain(arm)]
    figure, axis = pyplot.subplots(figsize=(7, 0.9 + 0.32 * max(len(arms), 2)), layout="constrained")
    for row, arm in enumerate(arms):
        gain = result.gain(arm)
        axis.errorbar(gain.mean, row, xerr=gain.half or 0.0, fmt="o", color="tab:blue", capsize=3)
        control = result.arms[CONTROL]
        for seed in set(result.arms[arm]) & set(control):
            last = (mean_recall(run[seed]["curve"][-1]) for run in (result.arms[arm], control))
            ours, theirs = last
            axis.plot(ours - theirs, row, ".", color="tab:orange", markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(arms)), arms)
    axis.invert_yaxis()
    axis.set(xlabel="mean recall over LPT's, paired by seed (orange: single seeds)")
    axis.grid(alpha=0.3, axis="x")
    return figure
