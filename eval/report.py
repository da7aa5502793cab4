"""results.json and report.md: every figure of the run, and the same in tables with models side by side."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .store import write_json

Results = dict[str, Any]


def write(results: Results, folder: Path) -> None:
    write_json(folder / "results.json", results)
    text = "\n".join(_lines(results)) + "\n"
    (folder / "report.md").write_text(text, encoding="utf-8")


def tasks_of(results: Results) -> list[str]:
    """Task names in the order in which they were run."""
    return list(dict.fromkeys(task for model in results["models"] for task in model["tasks"]))


def table(results: Results) -> str:
    """Scores in per cent with 95 % intervals; a row a task, a column a model."""
    models = results["models"]
    rows = [["task", *(model["label"] for model in models)]]
    for task in tasks_of(results):
        rows.append([task, *(_cell(model["tasks"].get(task)) for model in models)])
    return _aligned(rows)


def _cell(summary: dict[str, Any] | None) -> str:
    if summary is None:
        return "-"
    if "perplexity" in summary:
        return f"perplexity {_perplexity(summary)} (n={summary['n']})"
    low, high = 100 * summary["low"], 100 * summary["high"]
    return f"{100 * summary['score']:.1f} [{low:.1f}, {high:.1f}] (n={summary['n']})"


def _perplexity(figures: dict[str, Any]) -> str:
    return f"{figures['perplexity']:.2f}" if figures["perplexity"] < 1e6 else f"{figures['perplexity']:.2e}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "| " + " | ".join("-" * width for width in widths) + " |", *lines[1:]])


def _lines(results: Results) -> Iterator[str]:
    yield "# Evaluation\n"
    yield f"`{results['command']}`\n"
    yield "Scores in per cent with 95 % bootstrap intervals over items; n counts items.\n"
    yield table(results) + "\n"
    yield "## Models\n"
    yield _models_table(results) + "\n"
    yield "## Time\n"
    yield "Seconds that each task was waited for, and the part of them in which the model did not answer.\n"
    yield _times_table(results) + "\n"
    for task in tasks_of(results):
        yield from _breakdown(results, task)
    if results["plots"]:
        yield "## Plots\n"
        yield from (f"![{Path(name).stem}](plots/{name})" for name in results["plots"])
        yield ""
    yield from _problems(results)


def _models_table(results: Results) -> str:
    rows = [["model", "path", "recurrent state (elements)", "GPU memory", "seconds", "outside the model"]]
    for model in results["models"]:
        state = model.get("state_elements")
        share = _share(model["outside_share"])
        peak = f"{model['peak_gpu_gb']:.2f} GB" if model["peak_gpu_gb"] else "-"
        size = f"{state:,}" if state else "-"
        rows.append([model["label"], model["path"], size, peak, f"{model['seconds']:.1f}", share])
    return _aligned(rows)


def _share(outside: float | None) -> str:
    # runs that found everything answered have spent no time in the model
    return "-" if outside is None else f"{100 * outside:.1f} %"


def _times_table(results: Results) -> str:
    rows = [["task", *(model["label"] for model in results["models"])]]
    for task in tasks_of(results):
        rows.append([task, *(_time_cell(model["tasks"].get(task)) for model in results["models"])])
    return _aligned(rows)


def _time_cell(summary: dict[str, Any] | None) -> str:
    return "-" if summary is None else f"{summary['seconds']:.1f} s, {_share(summary['outside_share'])}"


def _breakdown(results: Results, task: str) -> Iterator[str]:
    summaries = [(model["label"], model["tasks"].get(task)) for model in results["models"]]
    if any("perplexity" in summary for _, summary in summaries if summary):
        yield f"## {task}: perplexity by position\n"
        yield _positions(summaries) + "\n"
        return
    fields = next((list(summary["by"]) for _, summary in summaries if summary), [])
    for field in (field for field in fields if "," not in field):
        values = sorted({row[field] for _, summary in summaries if summary for row in summary["by"][field]})
        rows = [[field, *(label for label, _ in summaries)]]
        for value in values:
            rows.append([str(value), *(_value_cell(summary, field, value) for _, summary in summaries)])
        yield f"## {task} by {field}\n"
        yield _aligned(rows) + "\n"


def _positions(summaries: Sequence[tuple[str, dict[str, Any] | None]]) -> str:
    """A row a range of positions, as far as the longest document reaches."""
    found = [
        {row["from"]: row for row in summary["by_position"]} if summary else {} for _, summary in summaries
    ]
    ranges = {first: row["to"] for rows in found for first, row in rows.items()}
    table = [["positions", *(label for label, _ in summaries)]]
    for first, end in sorted(ranges.items()):
        cells = [_perplexity(rows[first]) if first in rows else "-" for rows in found]
        table.append([f"{first:,} to {end - 1:,}", *cells])
    return _aligned(table)


def _value_cell(summary: dict[str, Any] | None, field: str, value: Any) -> str:
    row = next((row for row in (summary or {"by": {field: []}})["by"][field] if row[field] == value), None)
    return "-" if row is None else f"{100 * row['score']:.1f} (n={row['n']})"


def _problems(results: Results) -> Iterator[str]:
    skipped = results["skipped"]
    failed = [(model["label"], *entry) for model in results["models"] for entry in model["failed"].items()]
    if not skipped and not failed and not results["not_finished"]:
        return
    yield "## Not run\n"
    yield from (f"- {label}: {reason}" for label, reason in results["not_finished"].items())
    yield from (f"- {task}: {reason}" for task, reason in skipped.items())
    yield from (f"- {task} with {label}: {reason}" for label, task, reason in failed)
