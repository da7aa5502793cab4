"""Operators on one GPU, ours beside the packages': time, TFLOP/s and GB/s beside what the card can do.

    python -m benchmarks.operators [lengths=65536] [operators=GLA,SSD,...] [seconds=60]
                                   [output=operators.json]

GLA, SSD, convolution, cross-entropy and norms at the 1.3B shapes, expanded ones too, forward and backward,
bf16. TFLOP/s and GB/s come from counted FLOPs and least bytes (benchmarks/operator_cases.py), and stand
beside two ceilings measured in the same run: a bf16 product of 8192-cubed and a copy of 2 GB. CUDA events,
medians after warming up. Prints a Markdown table row by row and writes it as JSON.

Kernels are compiled by several processes first. `seconds` bounds the whole run: what it leaves no time for is
listed. With nothing compiled yet the packages' own autotuning may need more (seconds=600) the first time.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

with contextlib.suppress(ImportError):  # where present, narrows the packages' autotuning for a short check
    import fast_autotune  # noqa: F401

import torch
from torch import Tensor

from benchmarks.operator_cases import Case, Work, cases
from benchmarks.operators_gla import time_call
from models.command_line import run_command

PRODUCT_SIZE, COPY_BYTES = 8192, 2 * 10**9
WARM_UP_TOKENS = 2048
COMPILING_SHARE = 0.6  # of `seconds`, at most


@dataclass(frozen=True)
class Arguments:
    """Measure operators beside the packages' own.

    lengths=N,...        tokens (65536)
    operators=NAME,...   only those whose name begins so, in any case; none: all
    implementations=...  only these (ours,fla,mamba_ssm,causal_conv1d)
    seconds=N            of the whole run (60)
    workers=N            processes that compile kernels first; 0: none; none: one a core, at most 16
    output=FILE          JSON (operators.json)
    """

    lengths: str = "65536"
    operators: str | None = None
    implementations: str = "ours,fla,mamba_ssm,causal_conv1d"
    seconds: float = 60.0
    workers: int | None = None
    output: str = "operators.json"


@dataclass(frozen=True)
class Ceilings:
    """What the card reaches at best."""

    tflops: float
    gbs: float


@dataclass(frozen=True)
class Row:
    """One pass of one implementation."""

    operator: str
    shape: str
    tokens: int
    implementation: str
    part: str
    milliseconds: float
    tflops: float
    gbs: float
    peak_gb: float | None  # what the backward pass takes on top, its results included


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def milliseconds(call: Callable[[], object], repeats: int = 7) -> float:
    if device() == "cuda":
        return time_call(call, repeats)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def measure_ceilings(size: int = PRODUCT_SIZE, copied: int = COPY_BYTES) -> Ceilings:
    """A bf16 product of `size` cubed, and a copy of `copied` bytes, each byte read and written."""
    left, right = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    product = milliseconds(lambda: left @ right)
    source = torch.zeros(copied, dtype=torch.uint8, device=device())
    target = torch.empty_like(source)
    copy = milliseconds(lambda: target.copy_(source))
    return Ceilings(2 * size**3 / product / 1e9, 2 * copied / copy / 1e6)


def draw_inputs(case: Case, tokens: int) -> dict[str, Tensor]:
    torch.manual_seed(0)

    def draw(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(*shape, device=device(), dtype=dtype).requires_grad_()

    return case.inputs(draw, tokens)


def measure(case: Case, implementation: str, tokens: int) -> list[Row]:
    """Forward and backward of one implementation, or both as one where they cannot be told apart."""
    inputs = draw_inputs(case, tokens)
    wanted = [x for name, x in inputs.items() if name not in case.constants]

    def forward() -> tuple[Tensor, ...]:
        return case.calls[implementation](**inputs)

    outputs = forward()
    cotangents = [torch.randn_like(y) for y in outputs]

    def backward() -> None:
        torch.autograd.grad(outputs, wanted, cotangents, retain_graph=True)

    def both() -> None:
        torch.autograd.grad(forward(), wanted, cotangents)

    def row(part: str, call: Callable[[], object], work: Work, peak: float | None) -> Row:
        time_ms = milliseconds(call)
        flops, moved = tokens * work.flops, tokens * work.moved + work.fixed_bytes
        rates = flops / time_ms / 1e9, moved / time_ms / 1e6
        return Row(case.operator, case.shape, tokens, implementation, part, time_ms, *rates, peak)

    if case.backward is None:
        del outputs
        return [row("both", both, case.forward, _peak(both))]
    found = [row("forward", forward, case.forward, None)]
    return [*found, row("backward", backward, case.backward, _peak(backward))]


def _peak(call: Callable[[], object]) -> float:
    """GB that a call takes on top of what is there."""
    if device() == "cpu":
        return 0.0
    call()  # a first call may autotune, with buffers of its own
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e9


def header(ceilings: Ceilings) -> str:
    """The table's head; its ceilings are in the names of two columns."""
    columns = [
        *("operator", "shape", "tokens", "implementation", "pass", "ms"),
        *("TFLOP/s", f"of {ceilings.tflops:.0f}", "GB/s", f"of {ceilings.gbs:.0f}", "peak GB"),
    ]
    return f"| {' | '.join(columns)} |\n|" + " --- |" * len(columns)


def line(row: Row, ceilings: Ceilings) -> str:
    flops = [f"{row.tflops:.0f}", f"{row.tflops / ceilings.tflops:.0%}"] if row.tflops else ["", ""]
    cells = [
        *(row.operator, row.shape, f"{row.tokens:,}", row.implementation, row.part),
        f"{row.milliseconds:.3f}",
        *flops,
        f"{row.gbs:.0f}",
        f"{row.gbs / ceilings.gbs:.0%}",
        "" if row.peak_gb is None else f"{row.peak_gb:.1f}",
    ]
    return f"| {' | '.join(cells)} |"


def chosen(arguments: Arguments) -> list[tuple[int, str]]:
    """What to measure: (index of the case, implementation).

    Raises:
        ValueError: a name that no operator or implementation has.
    """
    every = cases()
    known = {name for case in every for name in case.calls}
    wanted = arguments.implementations.split(",")
    if unknown := set(wanted) - known:
        raise ValueError(
            f"implementations: {min(unknown)!r} is unknown; there are {', '.join(sorted(known))}"
        )
    starts = [""] if arguments.operators is None else arguments.operators.lower().split(",")
    operators = sorted({case.operator for case in every})
    for start in starts:
        if not any(name.lower().startswith(start) for name in operators):
            raise ValueError(f"operators: none begins with {start!r}; there are {'; '.join(operators)}")
    return [
        (index, name)
        for index, case in enumerate(every)
        if case.operator.lower().startswith(tuple(starts))
        for name in case.calls
        if name in wanted
    ]


def _compile_one(index: int, implementation: str) -> None:
    with contextlib.suppress(Exception):  # the measurement will say what is wrong
        case = cases()[index]
        inputs = draw_inputs(case, WARM_UP_TOKENS)
        outputs = case.calls[implementation](**inputs)
        wanted = [x for name, x in inputs.items() if name not in case.constants]
        torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs])


def compile_all(work: list[tuple[int, str]], workers: int, seconds: float) -> None:
    """Fills the compilers' disk caches with several processes, for at most `seconds`."""
    until = time.monotonic() + seconds
    with multiprocessing.get_context("spawn").Pool(workers) as pool:  # leaving it ends what still runs
        for job in [pool.apply_async(_compile_one, one) for one in work]:
            job.wait(max(0.0, until - time.monotonic()))


def measure_all(
    work: list[tuple[int, str]], lengths: list[int], until: float
) -> Iterator[list[Row] | dict[str, str]]:
    """Rows, or what kept an implementation from giving any, one implementation and length at a time."""
    every = cases()
    for tokens in lengths:
        for index, implementation in work:
            case = every[index]
            label = {"operator": case.operator, "shape": case.shape, "implementation": implementation}
            if time.monotonic() > until:
                yield label | {"tokens": f"{tokens:,}", "error": "no time left"}
                continue
            try:
                yield measure(case, implementation, tokens)
            except Exception as error:
                reason = (str(error).splitlines() or [""])[0][:300]
                yield label | {"tokens": f"{tokens:,}", "error": f"{type(error).__name__}: {reason}"}
            gc.collect()
            if device() == "cuda":
                torch.cuda.empty_cache()


def environment() -> dict[str, str]:
    card = torch.cuda.get_device_name() if device() == "cuda" else "cpu"
    return {"device": card, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}


def act(arguments: Arguments) -> None:
    begin = time.monotonic()
    work = chosen(arguments)
    lengths = [int(text) for text in arguments.lengths.split(",")]
    workers = arguments.workers
    if workers is None:
        workers = min(16, os.cpu_count() or 1, len(work)) if device() == "cuda" else 0
    if workers:
        compile_all(work, workers, COMPILING_SHARE * arguments.seconds)
        print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    ceilings = measure_ceilings() if device() == "cuda" else measure_ceilings(256, 10**6)
    print(f"{environment()}\n\n{header(ceilings)}")
    rows, failures = [], []
    for found in measure_all(work, lengths, begin + arguments.seconds):
        if isinstance(found, dict):
            failures.append(found)
            continue
        rows += found
        print("\n".join(line(row, ceilings) for row in found), flush=True)
    for failure in failures:
        print("not measured: " + ", ".join(failure.values()))
    record = {"environment": environment(), "ceilings": asdict(ceilings), "failures": failures}
    record["rows"] = [asdict(row) for row in rows]
    Path(arguments.output).write_text(json.dumps(record, indent=1) + "\n")
    print(f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    raise SystemExit(run_command(Arguments, act))
