"""Mean and 95 % interval over seeds: Student's t, as they are few; differences are paired by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# 97.5 % points of Student's t for 1, 2, ... degrees of freedom
T_POINTS = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)


@dataclass(frozen=True)
class Estimate:
    """Mean over n seeds, and half the width of its 95 % interval: None for one seed."""

    mean: float
    half: float | None
    n: int

    @property
    def low(self) -> float | None:
        return None if self.half is None else self.mean - self.half

    @property
    def high(self) -> float | None:
        return None if self.half is None else self.mean + self.half

    @property
    def sign(self) -> int:
        """1 or -1 when the interval lies on one side of 0, else 0."""
        if self.half is None or abs(self.mean) <= self.half:
            return 0
        return 1 if self.mean > 0 else -1


def estimate(values: Sequence[float]) -> Estimate:
    """Raises ValueError without values, and beyond 21 of them, where the table of t ends."""
    n = len(values)
    if not 1 <= n <= len(T_POINTS) + 1:
        raise ValueError(f"{n} values: expected 1 to {len(T_POINTS) + 1}")
    mean = sum(values) / n
    if n == 1:
        return Estimate(mean, None, 1)
    variance = sum((value - mean) ** 2 for value in values) / (n - 1)
    return Estimate(mean, T_POINTS[n - 2] * math.sqrt(variance / n), n)


def paired(values: Mapping[int, float], control: Mapping[int, float]) -> Estimate | None:
    """Of the difference to the control by seed, over the seeds that both have; None without any."""
    seeds = sorted(set(values) & set(control))
    return estimate([values[seed] - control[seed] for seed in seeds]) if seeds else None
