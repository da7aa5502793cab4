"""Training throughput of the 1.3B models on one GPU, beside the plain flash-linear-attention loop.

    python -m benchmarks.throughput [rows=gla-lpt,gla-statex,...] [length=65536] [batch=1] [steps=5]
                                    [equal=false] [recompute=auto] [memory_gb=84.9]
                                    [output=throughput.json] [profile=false]

Every row runs in this one process, on random tokens, from random weights: a step is forward, backward,
clipping and AdamW. Rows named `fla-*` are flash-linear-attention's own models in a plain loop with bf16
parameters and every layer recomputed; all others are this repository's, with fp32 parameters and moments,
bf16 products (`*-fp8`: fp8 products) and automatic recomputation.

`length=4096,16384,65536,262144` measures every row at each length. `recompute=full` (or another level) makes
every layer of ours do that; a single row may end in `@LEVEL` or `@ROW` (benchmarks/throughput_rows.py).
Memory left over buys less recomputation, so that automatic rows do not compare like with like: `equal=true`
adds, for every expanded row, the unexpanded model with the same levels (`gla-lpt@gla-statex`), and the second
table holds both prices. `profile=true` adds each row's kernels, by share of one step. `memory_gb` caps what a
row may take, so that a larger card answers for an H100 80GB (84.9e9 bytes); a row that does not fit says so.

Prints tables and writes the same figures, with versions and the card's name, as JSON. A row takes 10 to 20 s
at 65,536 tokens with steps=3, a minute at 262,144.
"""

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from benchmarks.throughput_rows import LEVELS, ROWS, Load, build, products_of, split_name
from benchmarks.throughput_table import PRICED, Row, describe, equal_row, price_table, prices, table

LEARNING_RATE = 3e-4
DEFAULTS = {
    "rows": ",".join(ROWS),
    "length": "65536",
    "batch": "1",
    "steps": "5",
    "equal": "false",
    "recompute": "auto",
    "memory_gb": "84.9",
    "output": "throughput.json",
    "profile": "false",
}


class DoesNotFitError(RuntimeError):
    """A row needs more memory than it may take."""


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, autocast: bool
) -> float:
    """One optimiser step on `[B, T]` tokens. Returns the loss."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def print_kernels(step: Callable[[], float], most: int = 30) -> None:
    """Runs `step` under the profiler and prints its kernels by total time."""
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    kernels = [
        event
        for event in profiler.key_averages()
        if event.self_device_time_total > 0 and event.device_type.name == "CUDA"
    ]
    kernels.sort(key=lambda event: -event.self_device_time_total)
    total = sum(event.self_device_time_total for event in kernels)
    print(f"kernels of one step, {total / 1e3:.0f} ms in all:")
    for event in kernels[:most]:
        share = event.self_device_time_total / total
        print(
            f"  {event.self_device_time_total / 1e3:8.1f} ms {share:6.1%} {event.count:5d}  {event.key[:90]}"
        )


def measure(name: str, load: Load, steps: int, profile: bool = False) -> Row:
    """Builds the model of a row, takes two warm-up steps and `steps` timed ones.

    Raises:
        DoesNotFitError: out of memory; says with which recomputation.
    """
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    levels: list[str] = []
    with products_of(ROWS[split_name(name)[0]]):
        try:
            start = time.perf_counter()
            model, levels = build(name, load)
            return _timed_row(name, load, steps, profile, model, levels, start)
        except torch.OutOfMemoryError as error:
            tokens = f"{load.batch} x {load.length:,} tokens"
            recomputed = f", recomputed: {describe(levels)}," if levels else ""
            raise DoesNotFitError(
                f"does not fit: {tokens}{recomputed} need more than {load.memory / 1e9:.1f} GB "
                f"({str(error).splitlines()[0]})"
            ) from None


def _timed_row(
    name: str, load: Load, steps: int, profile: bool, model: nn.Module, levels: list[str], start: float
) -> Row:
    optimizer = _adamw(model)
    autocast = not name.startswith("fla-")
    tokens = torch.randint(0, model.config.vocab_size, (load.batch, load.length), device=model.device)
    times, first, loss = [], 0.0, 0.0
    for step in range(steps + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        loss = train_step(model, optimizer, tokens, autocast)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
        if step == 0:
            first = time.perf_counter() - start
    if profile:
        print_kernels(lambda: train_step(model, optimizer, tokens, autocast))
    timed = times[2:]
    median = statistics.median(timed)
    return Row(
        name=name,
        length=load.length,
        batch=load.batch,
        tokens_per_second=load.batch * load.length / median,
        step_seconds=median,
        spread=(max(timed) - min(timed)) / median,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        reserved_gb=torch.cuda.max_memory_reserved() / 1e9,
        first_step_seconds=first,
        loss=loss,
        levels=levels,
    )


def environment() -> dict[str, str]:
    """Versions and card, for the record."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), **versions}


def parse(arguments: list[str]) -> dict[str, str]:
    """`key=value` arguments over their defaults.

    Raises:
        ValueError: an unknown key, row or level, or a number that is none.
    """
    options = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.removeprefix("--").partition("=")
        if key not in options:
            raise ValueError(f"unknown key {key!r}; known keys: {', '.join(options)}")
        options[key] = value
    for name in options["rows"].split(","):
        split_name(name)
    for key in ("length", "batch", "steps"):
        parts = options[key].split(",") if key == "length" else [options[key]]
        if not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"{key}={options[key]!r}: expected a whole number above 0")
    if options["recompute"] not in ("auto", *LEVELS):
        raise ValueError(f"recompute={options['recompute']!r}: expected auto, {', '.join(LEVELS)}")
    for key in ("equal", "profile"):
        if options[key] not in ("true", "false"):
            raise ValueError(f"{key}={options[key]!r}: expected true or false")
    return options


def names_to_run(options: dict[str, str]) -> list[str]:
    """The rows asked for, each with the level that `recompute` names."""
    names = options["rows"].split(",")
    if options["recompute"] == "auto":
        return names
    ours = [name for name in names if ROWS[split_name(name)[0]].source == "ours" and "@" not in name]
    return [f"{name}@{options['recompute']}" if name in ours else name for name in names]


def equal_names(results: list[Row]) -> Iterator[str]:
    """Rows still missing for the prices at equal recomputation: yielded while `results` grows."""
    for row in list(results):
        over = PRICED.get(row.base)
        ours = ROWS[row.base].source == "ours"
        if ours and over is not None and "@" not in row.name and equal_row(row, results) is None:
            yield f"{over}@{row.name}"


def run_all(
    options: dict[str, str], memory: float, keep: Callable[[list[Row], list[dict]], None]
) -> list[Row]:
    """Measures every row at every length; `keep` is called with all figures and failures after each."""
    results: list[Row] = []
    failures: list[dict] = []
    for length in map(int, options["length"].split(",")):
        load = Load(length, int(options["batch"]), memory)
        here: list[Row] = []

        def run(name: str, load: Load = load, here: list[Row] = here) -> None:
            try:
                here.append(measure(name, load, int(options["steps"]), options["profile"] == "true"))
                results.append(here[-1])
            # out of memory, a baseline's package missing, a level that the family lacks: say so, go on
            except Exception as error:
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                failures.append({"name": name, "length": load.length, "error": reason})
            gc.collect()
            torch.cuda.empty_cache()
            keep(results, failures)

        for name in names_to_run(options):
            run(name)
        if options["equal"] == "true":
            for name in equal_names(here):
                run(name)
    return results


def report(options: dict[str, str], results: list[Row], failures: list[dict]) -> None:
    """Prints the tables and writes the record."""
    found = prices(results)
    print(table(results))
    if found:
        print("\n" + price_table(found))
    for failure in failures:
        print(f"not measured: {failure['name']}, {failure['length']:,} tokens: {failure['error']}")
    print(flush=True)
    record = {
        "environment": environment(),
        "options": options,
        "rows": [asdict(row) | {"recompute": row.recompute} for row in results],
        "prices": [asdict(price) for price in found],
        "failures": failures,
    }
    Path(options["output"]).write_text(json.dumps(record, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    try:
        options = parse(arguments)
    except ValueError as error:
        print(f"benchmarks.throughput: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks.throughput: needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py does
    total = torch.cuda.get_device_properties(0).total_memory
    memory = min(float(options["memory_gb"]) * 1e9, total)
    torch.cuda.set_per_process_memory_fraction(memory / total)
    run_all(options, memory, lambda results, failures: report(options, results, failures))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
