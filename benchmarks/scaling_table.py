"""What a run of benchmarks.scaling left behind, read, checked and tabulated."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FIRST_STEP_TOLERANCE = 1e-4  # relative; same weights and same sequences, so only rounding may differ
TAIL = 5  # last lines of its output that a failed run shows, after as many that name an error
_PATTERNS = {
    "distribution": r"^distribution +(.+)$",
    "first_step": r"^first step done ([\d.]+) s after the start",
    "levels": r"^memory a .*recompute=(.+)$",
    "measured_levels": r"^recompute, measured on this GPU: (.+)$",
    "went_on": r"^going on from (.+)$",
    "save": r"^saved .+ in (?:(\d+)h)?(\d+)m(?:(\d+)s)?$",
}


@dataclass(frozen=True)
class Case:
    """One run of a training script."""

    script: str  # a file in scripts, without .sh
    launch: str
    n_gpus: int  # processes, on a CPU
    last_step: int  # optimiser steps, counted from the start of training
    saves: bool = False  # a checkpoint at its last step, for the case that resumes
    resumes: bool = False  # goes on from that checkpoint

    @property
    def folder(self) -> str:
        """Shared with the case that it goes on from."""
        return f"{self.script}-{self.launch}-{self.n_gpus}"

    @property
    def name(self) -> str:
        return self.folder + ("-resumed" if self.resumes else "")


@dataclass
class Row:
    """One run as measured; None where a run did not get that far."""

    case: Case
    problem: str = ""  # why it failed or was not started; empty: it did what it was asked to
    tail: list[str] = field(default_factory=list)  # the most telling lines of a failed run's output
    out_of_memory: bool = False
    wall_seconds: float = 0.0  # of the whole script: checks, launcher, training, saving
    distribution: str | None = None  # what came up, in the run's own words
    levels: str | None = None  # layers by recomputation
    first_step_seconds: float | None = None  # from the start of train.py to the end of its first step
    save_seconds: float | None = None  # the run prints whole seconds
    checkpoint_bytes: int | None = None
    records: list[dict[str, Any]] = field(default_factory=list)  # of metrics.jsonl, this run's steps alone

    @property
    def step_seconds(self) -> float | None:
        """Median, without the first two steps, which compile kernels and grow the allocator's segments."""
        steady = [record["step_seconds"] for record in self.records[2:]]
        return statistics.median(steady) if steady else None

    @property
    def tokens_per_second(self) -> float | None:
        if self.step_seconds is None:
            return None
        last, before = self.records[-1], self.records[-2]
        return (last["tokens"] - before["tokens"]) / self.step_seconds

    @property
    def memory_gb(self) -> float | None:
        """Peak of rank 0, 10^9 bytes."""
        return max((record["memory_gb"] for record in self.records), default=None)

    @property
    def losses(self) -> dict[int, float]:
        """Step -> nats a token; NaN where the run recorded none."""
        return {r["step"]: float("nan") if r["loss"] is None else r["loss"] for r in self.records}


def read_output(row: Row, text: str) -> None:
    """Fill in what the run printed."""
    found = {key: re.findall(pattern, text, re.MULTILINE) for key, pattern in _PATTERNS.items()}
    row.distribution = next(iter(found["distribution"]), None)
    row.levels = next(iter(found["measured_levels"] or found["levels"]), None)
    row.first_step_seconds = float(found["first_step"][0]) if found["first_step"] else None
    if found["save"]:
        hours, minutes, seconds = (int(part or 0) for part in found["save"][-1])
        row.save_seconds = 3600.0 * hours + 60 * minutes + seconds
    if row.case.resumes and not found["went_on"]:
        row.problem = row.problem or "it went on from no checkpoint"
    if row.problem:
        row.tail = telling_lines(text)
        row.out_of_memory = "out of memory" in text.lower()


def telling_lines(text: str) -> list[str]:
    """Lines that name an error, and the last ones: launchers end with a page on the ranks' exit statuses."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines[:-TAIL] if re.search(r"\w*(Error|error)\b.*:", line)]
    own = [line for line in errors if "ChildFailedError" not in line and "errors.html" not in line]
    return own[-TAIL:] + lines[-TAIL:]


def check_distribution(row: Row) -> str:
    """Whether what came up is what the case claims: launch kind, processes, devices. Answers what is not."""
    pattern = r"(\w+), (\w+)(?: ZeRO-(\d))?, (\d+) process\(es\) through (.+?), (\d+) x (.+)"
    match = re.fullmatch(pattern, row.distribution or "")
    if not match:
        return f"what came up is not known: {row.distribution}"
    kind, engine, stage, processes, _, devices, device = match.groups()
    launch, n_gpus = row.case.launch, row.case.n_gpus
    if launch.startswith("zero"):
        good = (kind, engine, stage) == ("DEEPSPEED", "DeepSpeedEngine", launch[-1])
    elif n_gpus > 1:
        kinds = {"ddp": "MULTI_GPU", "cpu": "MULTI_CPU"}
        good = (kind, engine) == (kinds[launch], "DistributedDataParallel")
    else:
        good = kind in (
            ("NO", "MULTI_GPU") if launch == "ddp" else ("NO",)
        )  # a launcher makes a group of one
    good = good and int(processes) == n_gpus and (device == "cpu" or int(devices) == n_gpus)
    return "" if good else f"asked for {launch} on {n_gpus}, got {row.distribution}"


def check_records(row: Row, first_step: int, tokens_per_step: int) -> str:
    """Whether every step was recorded once, with the tokens that it must have seen. Answers what is wrong."""
    expected = [(step, step * tokens_per_step) for step in range(first_step, row.case.last_step + 1)]
    found = [(record["step"], record["tokens"]) for record in row.records]
    return "" if found == expected else f"steps and tokens are {found}, expected {expected}"


def check_position(state: dict[str, Any], step: int, slots: int) -> str:
    """Whether a checkpoint's trainer.json stands after `step` sequences in every slot of the corpus."""
    sequences = [position["sequence"] for position in state["data"]["positions"].values()]
    return "" if sequences == [step] * slots else f"sequences read by each slot: {sequences}, not {step}"


def baseline(row: Row, rows: Sequence[Row]) -> Row | None:
    """The run of the same script on the fewest GPUs; where it was repeated, the one that ended well."""
    same = [r for r in rows if r.case.script == row.case.script and r.records and not r.case.resumes]
    return min(same, key=lambda r: (r.case.n_gpus, bool(r.problem)), default=None)


def loss_differences(row: Row, base: Row | None) -> dict[int, float]:
    """Step -> relative difference of the losses, for the steps that both have."""
    if base is None or base is row:
        return {}
    return {
        step: abs(loss - base.losses[step]) / abs(base.losses[step])
        for step, loss in row.losses.items()
        if step in base.losses
    }


def largest(differences: dict[int, float]) -> float | None:
    """NaN where any is: max() would pass over it."""
    values = list(differences.values())
    return next((value for value in values if value != value), max(values, default=None))


def disagreement(differences: dict[int, float], tolerance: float) -> str:
    """Which step's loss is too far from the baseline's; NaN always is."""
    for step, gap in differences.items():
        if not gap <= (FIRST_STEP_TOLERANCE if step == 1 else tolerance):
            return f"the loss of step {step} is {gap:.1e} off the baseline's"
    return ""


def efficiency(row: Row, base: Row | None) -> float | None:
    """Tokens/s a GPU over the baseline's."""
    if base is None or not (row.tokens_per_second and base.tokens_per_second):
        return None
    return row.tokens_per_second / row.case.n_gpus / (base.tokens_per_second / base.case.n_gpus)


def lost_seconds(row: Row, base: Row | None) -> float | None:
    """Seconds a step beyond the baseline's, divided by how many times more GPUs there are."""
    if base is None or base is row or not (row.step_seconds and base.step_seconds):
        return None
    return row.step_seconds - base.step_seconds * base.case.n_gpus / row.case.n_gpus


def summary(row: Row, rows: Sequence[Row]) -> dict[str, Any]:
    """A row with everything that follows from it, for the JSON file."""
    base = baseline(row, rows)
    differences = loss_differences(row, base)
    return {
        "name": row.case.name,
        **asdict(row),
        "step_seconds": row.step_seconds,
        "tokens_per_second": row.tokens_per_second,
        "memory_gb": row.memory_gb,
        "baseline": base.case.name if base else None,
        "efficiency": efficiency(row, base),
        "lost_seconds": lost_seconds(row, base),
        "loss_differences": {step: gap if gap == gap else None for step, gap in differences.items()},
    }


_HEAD = (
    "run", "came up as", "tokens/s", "tokens/s/GPU", "efficiency", "step (s)", "lost a step (ms)",
    "loss, largest difference", "at step 1", "peak GB", "first step (s)", "save (s)", "size GB", "wall (s)",
    "layers by recomputation",
)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Markdown, a line a run, and below it what went wrong."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + " --- |" * len(_HEAD)]
    lines += ["| " + " | ".join(_cells(row, rows)) + " |" for row in rows]
    for row in rows:
        if row.problem:
            lines += ["", f"{row.case.name}: {row.problem}", *(f"    {line[:200]}" for line in row.tail)]
    return "\n".join(lines)


def _cells(row: Row, rows: Sequence[Row]) -> list[str]:
    base = baseline(row, rows)
    speed, gaps = row.tokens_per_second, loss_differences(row, base)
    lost, size = lost_seconds(row, base), row.checkpoint_bytes
    return [
        row.case.name + (" (see below)" if row.problem else ""),
        row.distribution or "",
        _text(speed, ",.0f"),
        _text(speed and speed / row.case.n_gpus, ",.0f"),
        _text(efficiency(row, base), ".1%"),
        _text(row.step_seconds, ".3f"),
        _text(lost and 1e3 * lost, ".0f"),
        _text(largest(gaps), ".1e"),
        _text(gaps.get(1), ".1e"),
        _text(row.memory_gb, ".1f"),
        _text(row.first_step_seconds, ".1f"),
        _text(row.save_seconds, ".0f"),
        _text(size and size / 1e9, ".2f"),
        _text(row.wall_seconds, ".0f"),
        row.levels or "",
    ]


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
