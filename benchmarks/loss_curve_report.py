"""Differences between loss curves, and what they say about benchmarks.loss_curve's runs."""

import statistics
from pathlib import Path

WINDOW = 20  # steps of a smoothed loss
Curves = dict[str, list[float] | str]  # run -> losses, or what went wrong
RESEEDED = ("reseeded 1", "reseeded 2", "reseeded 3")
# what is compared: (name of the difference, run, run)
PAIRS = (
    ("fast", "fast", "plain"),
    ("fp8", "fp8", "plain"),
    ("plain bf16", "plain bf16", "plain"),
    ("moved", "moved", "plain"),
    *((name, name, "fast") for name in RESEEDED),
)
MEANING = {
    "fast": "fast kernels in bf16, against plain in fp32",
    "fp8": "fp8 products, against plain in fp32",
    "plain bf16": "plain in bf16, against plain in fp32",
    "moved": "weights moved by 1e-6, both plain in fp32",
    **{name: f"{name}: other initial weights, both fast" for name in RESEEDED},
}


def smoothed(losses: list[float]) -> list[float]:
    """Means over a sliding window; a curve shorter than the window gives its mean."""
    width = min(WINDOW, len(losses))
    return [statistics.fmean(losses[i : i + width]) for i in range(len(losses) - width + 1)]


def difference(left: list[float], right: list[float]) -> dict[str, float]:
    """Largest and mean absolute difference of two smoothed curves, over the steps that both have."""
    steps = min(len(left), len(right))
    gaps = [abs(a - b) for a, b in zip(smoothed(left[:steps]), smoothed(right[:steps]))]
    # a run that diverged must not look equal: max() would pass over NaN
    broken = any(gap != gap for gap in gaps)
    largest = float("nan") if broken else max(gaps)
    return {"steps": steps, "max": largest, "mean": statistics.fmean(gaps)}


def compare(curves: Curves) -> dict[str, dict]:
    """Every difference that the runs at hand allow, and each run's last smoothed loss."""
    good = {name: losses for name, losses in curves.items() if not isinstance(losses, str)}
    differences = {
        name: difference(good[left], good[right])
        for name, left, right in PAIRS
        if left in good and right in good
    }
    return {"differences": differences, "final": {name: smoothed(x)[-1] for name, x in good.items()}}


def within_noise(result: dict[str, dict], name: str) -> bool | None:
    """Whether a difference is no larger than the noise; None where one of them is missing."""
    gap, noise = result["differences"].get(name), run_to_run_noise(result["differences"])
    if gap is None or noise is None:
        return False if name == "fast" else None
    return gap["max"] <= noise["max"] and gap["mean"] <= noise["mean"]  # false for NaN


def run_to_run_noise(differences: dict[str, dict]) -> dict[str, float] | None:
    """The mean of what the reseeded runs differ from the first; None where one is missing."""
    known = [differences[name] for name in RESEEDED if name in differences]
    if len(known) < len(RESEEDED):
        return None
    noise = {key: statistics.fmean(gap[key] for gap in known) for key in ("max", "mean")}
    return {"steps": min(gap["steps"] for gap in known)} | noise


def summary(family: str, result: dict[str, dict], curves: Curves, steps: int) -> str:
    """The figures as a Markdown table, and a sentence."""
    lines = [
        f"\n{family}: smoothed loss ({WINDOW} steps), nats a byte",
        "| difference | steps | largest | mean | last loss |",
        "|" + " --- |" * 5,
    ]
    for name, gap in result["differences"].items():
        last = result["final"][name]
        figures = f"{gap['steps']} | {gap['max']:.5f} | {gap['mean']:.5f}"
        lines.append(f"| {MEANING[name]} | {figures} | {last:.4f} |")
    if noise := run_to_run_noise(result["differences"]):
        figures = f"{noise['steps']} | {noise['max']:.5f} | {noise['mean']:.5f}"
        lines.append(f"| run-to-run noise: the mean of these | {figures} | |")
    lines += [f"plain ends at {result['final']['plain']:.4f}"] if "plain" in result["final"] else []
    lines += [f"FAIL {family} {name}: {what}" for name, what in curves.items() if isinstance(what, str)]
    if "fp8" in curves and curves["fp8"] == curves.get("fast"):
        lines.append(f"{family} fp8: the same bits as fast, so no product was formed in fp8")
    for name in ("fast", "fp8"):
        verdict = within_noise(result, name)
        if verdict is not None:
            lines.append(_sentence(family, name, verdict, result["differences"], steps))
    return "\n".join(lines)


def _sentence(family: str, name: str, good: bool, differences: dict[str, dict], steps: int) -> str:
    gap, noise = differences.get(name), run_to_run_noise(differences)
    if gap is None or noise is None:
        return f"FAIL {family} {name}: a run is missing, nothing to compare"
    ratios = [f"{gap[key] / noise[key]:.3f} of its {key}" for key in ("mean", "max") if noise[key]]
    if (moved := differences.get("moved")) and moved["mean"]:
        ratios.append(f"{gap['mean'] / moved['mean']:.1f} times what moving the weights by 1e-6 does")
    text = f"{'ok' if good else 'FAIL'} {family} {name}: {'within' if good else 'outside'} run-to-run noise"
    done = min(gap["steps"], noise["steps"])
    short = "" if done == steps else f"; the time allowed only {done} of {steps} steps"
    return f"{text} ({', '.join(ratios)}){short}"


def draw(curves: dict[str, Curves], target: Path) -> Path | None:
    """Smoothed losses above, differences to plain below, a column a family; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        2, len(curves), figsize=(6 * len(curves), 7), layout="constrained", squeeze=False, sharex="col"
    )
    for (above, below), (family, runs) in zip(axes.T, curves.items()):
        good = {name: losses for name, losses in runs.items() if not isinstance(losses, str)}
        for name, losses in good.items():
            above.plot(smoothed(losses), label=name, linewidth=1)
        for _, left, right in PAIRS:
            if left in good and right in good:
                gaps = [abs(a - b) for a, b in zip(smoothed(good[left]), smoothed(good[right]))]
                below.semilogy([max(gap, 1e-9) for gap in gaps], label=f"{left} - {right}", linewidth=1)
        above.set(title=family, ylabel=f"loss, mean of {WINDOW} steps (nats a byte)")
        below.set(xlabel="step", ylabel="difference")
        for axis in (above, below):
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    figure.savefig(target, dpi=150)
    plt.close(figure)
    return target
