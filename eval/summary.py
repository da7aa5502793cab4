"""From records of single items to the figures of a task: means, intervals, breakdowns."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

from .scoring import bootstrap_interval, position_buckets
from .store import Record


def summarise(family: str, task: str, records: Sequence[Record]) -> dict[str, Any]:
    """One task of one model: score with its 95 % interval, and the same by every field of the groups."""
    summary: dict[str, Any] = {
        "family": family,
        "task": task,
        "metric": records[0].get("metric", "accuracy"),
        **_figures(records),
    }
    fields = sorted({field for record in records for field in record["group"]})
    summary["by"] = {field: _by(records, field) for field in fields}
    for first, second in itertools.combinations(fields, 2):
        summary["by"][f"{first},{second}"] = [
            {first: value, **row}
            for value in _values(records, first)
            for row in _by([r for r in records if r["group"].get(first) == value], second)
        ]
    if "metrics" in records[0]:
        names = records[0]["metrics"]
        summary["metrics"] = {name: _mean([r["metrics"][name] for r in records]) for name in names}
    if task == "ppl":
        summary.update(_perplexity(records))
    return summary


def _figures(records: Sequence[Record]) -> dict[str, Any]:
    scores = [record["score"] for record in records]
    low, high = bootstrap_interval(scores)
    return {"n": len(scores), "score": _mean(scores), "low": low, "high": high}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _values(records: Sequence[Record], field: str) -> list[Any]:
    return sorted({record["group"][field] for record in records if field in record["group"]})


def _by(records: Sequence[Record], field: str) -> list[dict[str, Any]]:
    return [
        {field: value, **_figures([r for r in records if r["group"].get(field) == value])}
        for value in _values(records, field)
    ]


def _perplexity(records: Sequence[Record]) -> dict[str, Any]:
    """Over all tokens, and in each bucket of positions."""
    longest = max(record["prompt_tokens"] for record in records)
    rows = []
    for index, (first, end) in enumerate(position_buckets(longest)):
        parts = [record["answer"][index] for record in records if index < len(record["answer"])]
        total, count = (math.fsum(column) for column in zip(*parts, strict=True))
        rows.append({"from": first, "to": end, "perplexity": _exp(total / count), "tokens": int(count)})
    total = math.fsum(bucket[0] for record in records for bucket in record["answer"])
    count = sum(bucket[1] for record in records for bucket in record["answer"])
    return {"metric": "token probability", "perplexity": _exp(total / count), "by_position": rows}


def _exp(loss: float) -> float:
    return math.exp(min(loss, 700.0))
