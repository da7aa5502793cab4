"""Plots of a comparison: accuracy against length, depth heatmaps, bars, perplexity by position."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .report import Results, tasks_of

AXES = ("length", "pairs", "shots", "distance")


def draw(results: Results, folder: Path) -> list[Path]:
    """Every plot that the results have figures for, as PNG files in `folder`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name, paint in _plots(results):
        figure = pyplot.figure(figsize=(7, 4.5), layout="constrained")
        paint(figure)
        figure.savefig(folder / f"{name}.png", dpi=130)
        pyplot.close(figure)
        files.append(folder / f"{name}.png")
    return files


def _plots(results: Results) -> Iterator[tuple[str, Callable[[Any], None]]]:
    for task in tasks_of(results):
        summaries = [(m["label"], m["tasks"][task]) for m in results["models"] if task in m["tasks"]]
        name = task.replace(":", "_").replace("/", "_")
        if "perplexity" in summaries[0][1]:
            yield f"{name}_by_position", lambda figure, s=summaries: _perplexity(figure, s)
            continue
        for field in AXES:
            if any(len(summary["by"].get(field, ())) > 1 for _, summary in summaries):
                yield (
                    f"{name}_by_{field}",
                    lambda figure, s=summaries, t=task, f=field: _curve(figure, s, t, f),
                )
        if "depth,length" in summaries[0][1]["by"]:
            yield f"{name}_depth", lambda figure, s=summaries, t=task: _heatmaps(figure, s, t)
    for family in dict.fromkeys(s["family"] for m in results["models"] for s in m["tasks"].values()):
        if family != "ppl":
            yield f"{family}_scores", lambda figure, f=family: _bars(figure, results, f)


def _curve(figure: Any, summaries: list[tuple[str, dict]], task: str, field: str) -> None:
    axes = figure.subplots()
    for label, summary in summaries:
        rows = summary["by"].get(field, [])
        x = [row[field] for row in rows]
        line = axes.plot(x, [100 * row["score"] for row in rows], marker="o", label=label)[0]
        low, high = ([100 * row[end] for row in rows] for end in ("low", "high"))
        axes.fill_between(x, low, high, alpha=0.15, color=line.get_color(), linewidth=0)
    values = sorted({row[field] for _, summary in summaries for row in summary["by"].get(field, [])})
    axes.set_xscale("symlog" if values[0] == 0 else "log", base=2)
    axes.set_xticks(values, [str(value) for value in values], rotation=30)
    axes.minorticks_off()
    axes.set(xlabel=field, ylabel="accuracy (%)", ylim=(-3, 103), title=task)
    axes.grid(alpha=0.3)
    _legend(figure)


def _heatmaps(figure: Any, summaries: list[tuple[str, dict]], task: str) -> None:
    figure.set_size_inches(1.5 + 3.5 * len(summaries), 4)
    panels = figure.subplots(1, len(summaries), squeeze=False)[0]
    for axes, (label, summary) in zip(panels, summaries):
        rows = summary["by"]["depth,length"]
        lengths, depths = (sorted({row[field] for row in rows}) for field in ("length", "depth"))
        scores = {(row["depth"], row["length"]): 100 * row["score"] for row in rows}
        grid = [[scores.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        image = axes.imshow(grid, vmin=0, vmax=100, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [str(length) for length in lengths], rotation=45)
        axes.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axes.set(xlabel="length (tokens)", ylabel="depth", title=label)
    figure.suptitle(task)
    figure.colorbar(image, ax=list(panels), label="accuracy (%)")


def _bars(figure: Any, results: Results, family: str) -> None:
    axes = figure.subplots()
    models = [model for model in results["models"] if model["tasks"]]
    tasks = [
        task
        for task in tasks_of(results)
        if any(model["tasks"].get(task, {}).get("family") == family for model in models)
    ]
    width = 0.8 / len(models)
    for number, model in enumerate(models):
        here = [(place, model["tasks"][task]) for place, task in enumerate(tasks) if task in model["tasks"]]
        x = [place + (number - (len(models) - 1) / 2) * width for place, _ in here]
        height = [100 * summary["score"] for _, summary in here]
        below = [max(100 * (s["score"] - s["low"]), 0) for _, s in here]
        above = [max(100 * (s["high"] - s["score"]), 0) for _, s in here]
        axes.bar(x, height, width, yerr=[below, above], capsize=3, label=model["label"])
    axes.set_xticks(range(len(tasks)), tasks, rotation=20)
    axes.set(ylabel="score (%)", ylim=(0, 105), title=f"{family}, 95 % bootstrap intervals")
    axes.grid(axis="y", alpha=0.3)
    _legend(figure)


def _perplexity(figure: Any, summaries: list[tuple[str, dict]]) -> None:
    axes = figure.subplots()
    for label, summary in summaries:
        rows = summary["by_position"]
        axes.plot([row["to"] for row in rows], [row["perplexity"] for row in rows], marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="position (tokens, upper end of each range)", ylabel="perplexity", title="by position")
    axes.grid(alpha=0.3)
    _legend(figure)


def _legend(figure: Any) -> None:
    """Below the axes: inside, it would hide bars and curves near 100 %."""
    figure.legend(loc="outside lower center", ncols=3)
