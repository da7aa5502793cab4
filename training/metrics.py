"""Records of a run: metrics.jsonl always, TensorBoard and other trackers as `report_to` says."""

import json
import math
import os
from pathlib import Path
from typing import Any

from training.config import RunConfig
from training.trackers import open_tracker


class MetricsLog:
    """Appends one JSON object a record; a resumed run first drops what lies beyond its step.

    Args:
        run_dir: folder of the run.
        step: the step that training goes on from; 0 for a new run.
    """

    def __init__(self, config: RunConfig, run_dir: Path, step: int) -> None:
        self.path = run_dir / "metrics.jsonl"
        truncate_after(self.path, step)
        self._stream = self.path.open("a", encoding="utf-8")
        self._trackers = [open_tracker(name, config, run_dir, step) for name in config.report_to]

    def write(self, record: dict[str, Any]) -> None:
        """Record one step; `record["step"]` is its number, values that are not finite become null."""
        values = {key: _finite(value) for key, value in record.items()}
        self._stream.write(json.dumps(values) + "\n")
        self._stream.flush()
        numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
        for tracker in self._trackers:
            tracker.log(numbers, step=record["step"])

    def sync(self) -> None:
        """Bring the records to the disk; called before a checkpoint counts as complete."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()
        for tracker in self._trackers:
            tracker.finish()


def truncate_after(path: Path, step: int) -> None:
    """Drop the records beyond `step` and a last line cut short by a crash, replacing the file in one move."""
    if not path.exists():
        return
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    beside = path.with_suffix(".jsonl.tmp")
    beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(beside, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete records of a metrics.jsonl."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if math.isfinite(_step_of(line))]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None  # NaN is no JSON
    return value
