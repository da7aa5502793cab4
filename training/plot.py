"""Loss curves from metrics.jsonl: `python -m training.plot RUN_DIR... [output=loss.png]`."""

import sys
from pathlib import Path

from training.metrics import read_metrics


def plot_losses(run_dirs: list[Path], target: Path) -> Path:
    """Draw training and held-out loss against tokens, one colour a run, into a PNG.

    Raises:
        ValueError: a folder holds no records.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for run_dir in run_dirs:
        records = read_metrics(run_dir / "metrics.jsonl")
        if not records:
            raise ValueError(f"{run_dir}: no metrics.jsonl with records; give the folder of a run")
        colour = None
        for key, style in (("loss", "-"), ("val_loss", "o--")):
            points = [(r["tokens"], r[key]) for r in records if r.get(key) is not None]
            if points:
                label = run_dir.name if key == "loss" else f"{run_dir.name} held out"
                (line,) = axes.plot(
                    *zip(*points), style, label=label, color=colour, linewidth=1, markersize=3
                )
                colour = line.get_color()
    axes.set(xlabel="tokens", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target


def main(arguments: list[str]) -> int:
    outputs = [text.removeprefix("--") for text in arguments if text.removeprefix("--").startswith("output=")]
    run_dirs = [Path(text) for text in arguments if "output=" not in text]
    if not run_dirs:
        print("usage: python -m training.plot RUN_DIR... [output=loss.png]", file=sys.stderr)
        return 2
    target = Path(outputs[-1].partition("=")[2]) if outputs else run_dirs[0] / "loss.png"
    try:
        print(plot_losses(run_dirs, target))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
