"""The end of the quickstart: one table and one picture from the evaluation's results.json.

python scripts/quickstart_report.py FOLDER NAME,NAME,...    names of the models, in order of evaluation
"""

import json
import math
import sys
from pathlib import Path
from typing import Any


def recall_by_pairs(model: dict[str, Any]) -> dict[int, float]:
    """Number of pairs -> share of questions answered."""
    return {row["pairs"]: row["score"] for row in model["tasks"]["mqar"]["by"]["pairs"]}


def table(names: list[str], models: list[dict[str, Any]]) -> str:
    pairs = sorted(recall_by_pairs(models[0]))
    head = ["", "state elements", *(f"recall, {n} pairs" for n in pairs), "held-out loss"]
    rows = [head]
    for name, model in zip(names, models):
        recall = recall_by_pairs(model)
        loss = math.log(model["tasks"]["ppl"]["perplexity"])
        rows.append(
            [name, f"{model['state_elements']:,}", *(f"{recall[n]:.3f}" for n in pairs), f"{loss:.3f}"]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows)


def draw(names: list[str], models: list[dict[str, Any]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for name, model in zip(names, models):
        recall = recall_by_pairs(model)
        axes.plot(
            list(recall),
            list(recall.values()),
            marker="o",
            label=f"{name}, state {model['state_elements']:,}",
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(recall_by_pairs(models[0])), [str(n) for n in recall_by_pairs(models[0])])
    axes.set(xlabel="pairs to remember", ylabel="share of questions answered", ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def main(folder: Path, names: list[str]) -> None:
    models = json.loads((folder / "results.json").read_text(encoding="utf-8"))["models"]
    text = table(names, models)
    (folder / "quickstart.txt").write_text(text + "\n", encoding="utf-8")
    draw(names, models, folder / "quickstart.png")
    print(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","))
