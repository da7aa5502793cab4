"""Training throughput of the 1.3B models on one GPU, beside the plain flash-linear-attention loop.

    python -m benchmarks.throughput [rows=gla-lpt,gla-statex,...] [length=65536] [steps=5] [memory_gb=84.9]
                                    [output=throughput.json] [profile=false]

Every row runs in this one process, on random tokens, from random weights: a step is forward, backward,
clipping and AdamW. Rows named `fla-*` are flash-linear-attention's own models in a plain loop with bf16
parameters and every layer recomputed; all others are this repository's, with fp32 parameters and moments,
bf16 products and automatic recomputation. `profile=true` adds each row's kernels, by share of one step.
`memory_gb` caps what a row may take, so that a larger card answers for an H100 80GB (84.9e9 bytes). Prints a
table and writes the same figures, with versions and the card's name, as JSON.
"""

import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

LEARNING_RATE = 3e-4


@dataclass
class Row:
    """Figures of one benchmark row; times in seconds, memory in GB (1e9 bytes)."""

    name: str
    tokens_per_second: float
    step_seconds: float
    spread: float  # (slowest - fastest) / median of the timed steps
    peak_gb: float
    first_step_seconds: float  # from the start of building the model to the end of the first step
    loss: float
    recompute: str = ""


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )


def _fla(model: nn.Module) -> tuple[nn.Module, str]:
    model = model.to("cuda", torch.bfloat16)
    model.train()
    model.gradient_checkpointing_enable()
    return model, "all layers"


def fla_gla(num_heads: int = 4) -> tuple[nn.Module, str]:
    """flash-linear-attention's GLA-1.3B."""
    from fla.models import GLAConfig, GLAForCausalLM

    with torch.device("cuda"):
        return _fla(GLAForCausalLM(GLAConfig(num_heads=num_heads)))


def fla_mamba2() -> tuple[nn.Module, str]:
    """flash-linear-attention's Mamba2-1.3B, which runs mamba_ssm's and causal_conv1d's kernels."""
    from fla.models import Mamba2Config, Mamba2ForCausalLM

    shape = {"vocab_size": 50288, "tie_word_embeddings": True, "state_size": 128, "head_dim": 64}
    with torch.device("cuda"):
        return _fla(Mamba2ForCausalLM(Mamba2Config(**shape)))


def ours(family: str, length: int, memory: float, **expansion: object) -> tuple[nn.Module, str]:
    """This repository's 1.3B model, expanded or not, as `train.py` prepares it."""
    from models import build_model, expand_state
    from training.config import RunConfig
    from training.recompute import choose_recompute

    model = build_model(f"configs/models/{family}-1.3B.json", device="meta")
    if expansion:
        expand_state(model, **expansion)
    _fill(model.to_empty(device="cuda"))
    model.train()
    config = RunConfig(launch="ddp", max_len=length)
    levels = choose_recompute(model, config, 1, torch.device("cuda", torch.cuda.current_device()), memory)
    model.set_recompute(levels)
    return model, ", ".join(f"{levels.count(level)} {level}" for level in dict.fromkeys(levels))


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """Random weights drawn on the GPU: `model.initialize` draws on the CPU, reproducibly but slowly."""
    from models.draw import Draw

    draw = Draw(0)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            parameter.normal_(std=0.02)
        if sum(p.numel() for p in module.parameters(recurse=False)) < 2**20:
            model.initialize_module(module, draw)
    model.tie_weights()


def rows(length: int, memory: float) -> dict[str, Callable[[], tuple[nn.Module, str]]]:
    """All rows of the table, by name."""
    return {
        "fla-gla": fla_gla,
        "fla-gla-one-head": lambda: fla_gla(num_heads=1),
        "gla-lpt": lambda: ours("gla", length, memory),
        "gla-statex": lambda: ours("gla", length, memory, drop_prop=6, drop_mode="gla"),
        "gla-one-head": lambda: ours("gla", length, memory, drop_prop=1, drop_mode="gla"),
        "fla-mamba2": fla_mamba2,
        "mamba2-lpt": lambda: ours("mamba2", length, memory),
        "mamba2-statex": lambda: ours("mamba2", length, memory, drop_prop=6, drop_mode="mamba4"),
        "mamba2-all": lambda: ours("mamba2", length, memory, drop_prop=1, drop_mode="mamba4"),
    }


def train_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, tokens: torch.Tensor, autocast: bool
) -> float:
    """One optimiser step on `[1, T]` tokens. Returns the loss."""
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
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


def measure(
    name: str, build: Callable[[], tuple[nn.Module, str]], length: int, steps: int, profile: bool
) -> Row:
    """Builds the model of a row, takes two warm-up steps and `steps` timed ones."""
    torch.manual_seed(0)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    model, recompute = build()
    optimizer = _adamw(model)
    autocast = not name.startswith("fla-")
    tokens = torch.randint(0, model.config.vocab_size, (1, length), device="cuda")
    times, loss = [], 0.0
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
        tokens_per_second=length / median,
        step_seconds=median,
        spread=(max(timed) - min(timed)) / median,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9,
        first_step_seconds=first,
        loss=loss,
        recompute=recompute,
    )


def table(results: list[Row]) -> str:
    """The figures as a Markdown table, with ratios to the flash-linear-attention rows."""
    lines = [
        "| row | tokens/s | against fla | step (s) | spread | peak GB | first step (s) | recomputed |",
        "|" + " --- |" * 8,
    ]
    base = {"gla": "fla-gla", "mamba2": "fla-mamba2"}
    by_name = {row.name: row for row in results}
    for row in results:
        reference = by_name.get(base["mamba2" if "mamba2" in row.name else "gla"])
        ratio = f"{row.tokens_per_second / reference.tokens_per_second:.2f}x" if reference else ""
        lines.append(
            f"| {row.name} | {row.tokens_per_second:,.0f} | {ratio} | {row.step_seconds:.3f} "
            f"| {row.spread:.1%} | {row.peak_gb:.1f} | {row.first_step_seconds:.1f} | {row.recompute} |"
        )
    return "\n".join(lines)


def environment() -> dict[str, str]:
    """Versions and card, for the record."""
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "python": platform.python_version()}
    return {"gpu": torch.cuda.get_device_name(), "date": time.strftime("%Y-%m-%d"), **versions}


def parse(arguments: list[str], known: list[str]) -> dict[str, str]:
    """`key=value` arguments over their defaults.

    Raises:
        ValueError: an unknown key or row.
    """
    options = {
        "rows": ",".join(known),
        "length": "65536",
        "steps": "5",
        "memory_gb": "84.9",
        "output": "throughput.json",
        "profile": "false",
    }
    for argument in arguments:
        key, _, value = argument.removeprefix("--").partition("=")
        if key not in options:
            raise ValueError(f"unknown key {key!r}; known keys: {', '.join(options)}")
        options[key] = value
    unknown = [name for name in options["rows"].split(",") if name not in known]
    if unknown:
        raise ValueError(f"unknown row {unknown[0]!r}; rows: {', '.join(known)}")
    return options


def main(arguments: list[str]) -> int:
    try:
        options = parse(arguments, list(rows(0, 0)))
    except ValueError as error:
        print(f"benchmarks.throughput: {error}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("benchmarks.throughput: needs a CUDA device, and torch sees none", file=sys.stderr)
        return 2
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as train.py does
    length, steps = int(options["length"]), int(options["steps"])
    total = torch.cuda.get_device_properties(0).total_memory
    memory = min(float(options["memory_gb"]) * 1e9, total)
    torch.cuda.set_per_process_memory_fraction(memory / total)
    results: list[Row] = []
    for name in options["rows"].split(","):
        try:
            results.append(
                measure(name, rows(length, memory)[name], length, steps, options["profile"] == "true")
            )
        except (
            RuntimeError,
            ImportError,
        ) as error:  # out of memory, or a baseline's package missing: say so, go on
            print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0]}", file=sys.stderr)
        gc.collect()
        torch.cuda.empty_cache()
        print(table(results), flush=True)
        record = {"environment": environment(), "options": options, "rows": [asdict(row) for row in results]}
        Path(options["output"]).write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
