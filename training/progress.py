"""What a run tells its user while it trains: a progress bar and one line a logged step."""

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm import tqdm

# dense bf16 TFLOP/s of one GPU, from the makers' data sheets
_PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100": 989, "H200": 989, "H800": 989, "H20": 148, "B200": 2250, "A100": 312,
    "A800": 312, "L40S": 362, "L40": 181, "A40": 150, "A6000": 155, "4090": 165, "3090": 71,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """Dense bf16 FLOP/s of the device; None where it is not known, and then there is no MFU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in _PEAK_TFLOPS.items() if key in name), None)


def memory_gb(device: torch.device) -> float:
    """Peak memory of this process so far, in 10^9 bytes: of the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class StartClock:
    """What the time from the start of the program to the end of the first step goes into.

    Args:
        began: time.perf_counter() at the start, before the imports, which are the first part.
    """

    def __init__(self, began: float) -> None:
        self._began = self._last = began
        self._parts: list[str] = []
        self.done("imports")

    def done(self, part: str) -> None:
        """The time since the part before went into this one."""
        now = time.perf_counter()
        self._parts.append(f"{part} {now - self._last:.1f}")
        self._last = now

    def __str__(self) -> str:
        return f"first step done {self._last - self._began:.1f} s after the start ({', '.join(self._parts)})"


@dataclass
class Throughput:
    """Wall-clock of the steps since the last record.

    Attributes:
        flops_per_token: training FLOPs of one token, forward and backward without recomputation.
        peak: FLOP/s of one device, None when unknown.
    """

    world_size: int
    flops_per_token: float
    peak: float | None
    tokens: int = 0
    steps: int = 0
    data_seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def add(self, tokens: int, data_seconds: float) -> None:
        self.tokens += tokens
        self.steps += 1
        self.data_seconds += data_seconds

    def exclude(self, seconds: float) -> None:
        """Leave out time spent on a checkpoint or a validation."""
        self.since += seconds

    def record(self, steps_left: int) -> dict[str, float | None]:
        """Rates since the last call: tokens/s, tokens/s/GPU, MFU (0..1), seconds a step and for data, ETA."""
        now = time.perf_counter()
        seconds = max(now - self.since, 1e-9)
        per_gpu = self.tokens / seconds / self.world_size
        rates = {
            "tokens_per_second": self.tokens / seconds,
            "tokens_per_second_per_gpu": per_gpu,
            "mfu": per_gpu * self.flops_per_token / self.peak if self.peak else None,
            "step_seconds": seconds / self.steps,
            "data_seconds": self.data_seconds / self.steps,
            "eta_seconds": seconds / self.steps * steps_left,
        }
        self.tokens, self.steps, self.data_seconds, self.since = 0, 0, 0.0, now
        return rates


class Console:
    """Progress bar and lines of rank 0; silent on other ranks, no bar where the output is no terminal."""

    def __init__(self, active: bool, total: int) -> None:
        self._active = active
        self._first = True
        self._bar = tqdm(total=total, unit="step", dynamic_ncols=True, disable=None if active else True)

    def say(self, line: str) -> None:
        if self._active:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def advance(self, step: int, loss: float) -> None:
        self._bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        self._bar.update(step - self._bar.n)

    def first_step(self, start: "StartClock") -> None:
        """Once: how long the first step took from the start, and what in: imports, loading, compilation."""
        if self._first:
            start.done("first step")
            self.say(str(start))
        self._first = False

    def close(self) -> None:
        self._bar.close()


def format_record(record: dict[str, Any], total: int) -> str:
    """One line of a logged step."""
    parts = [
        f"step {record['step']}/{total}",
        f"loss {record['loss']:.4f}",
        f"lr {record['lr']:.3e}",
        f"grad {record['grad_norm']:.3f}",
        f"{short(record['tokens_per_second'])} tok/s ({short(record['tokens_per_second_per_gpu'])}/GPU)",
        f"MFU {record['mfu']:.1%}" if record["mfu"] is not None else "",
        f"mem {record['memory_gb']:.1f} GB",
        f"data {record['data_seconds']:.3f} s",
        f"ETA {duration(record['eta_seconds'])}",
        f"skipped {record['skipped_steps']}" if record["skipped_steps"] else "",
    ]
    return " | ".join(part for part in parts if part)


def short(value: float) -> str:
    """1234567 -> 1.23M"""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.2f}{unit}"
    return f"{value:.0f}"


def duration(seconds: float) -> str:
    """3725.2 -> 1h02m"""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
