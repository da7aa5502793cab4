"""Gated linear attention on a GPU in one go: errors against float64, then times, then the fastest settings.

    python -m benchmarks.gpu_check_gla [seconds=240] [out=FOLDER] [sections=errors,levels,times,tune]
    python -m benchmarks.gpu_check_gla sections=errors,levels groups=triton-bf16

Prints a table of relative errors by norm (this repository's kernels and fla's, forward and every gradient),
what a layer keeps and takes at each level of recomputation, the times at 65,536 tokens, and what the
candidates of tune_kernels take until `seconds` have passed since the start. A section that fails is printed
and the others go on; exit status 1 if one failed, or a row of our kernels. The best settings are written
below out/ in the layout of configs/kernels, each as soon as it is known.
"""

import importlib
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import tune_kernels
from benchmarks.operators_gla import SHAPES, measure_kernels, measure_operator
from models.command_line import run_command
from models.gla import GLABlock, GLAConfig
from models.ops.gla import gla, gla_recurrent, log_decay
from training.activation_probe import probe_layers

LENGTHS = (1, 63, 64, 65, 1000, 8192)
NAMES = ("o", "state", "dq", "dk", "dv", "dg", "dstate")
# relative error by norm: bf16 rounds to 2^-9; fla's float32 uses tf32 products
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float32: 3e-3}
GROUPS = [  # implementation, H, K, V, dtype, lengths
    ("triton", 2, 256, 512, torch.bfloat16, LENGTHS),
    ("triton", 1, 1024, 2048, torch.bfloat16, LENGTHS),
    ("triton", 2, 256, 512, torch.float32, LENGTHS),
    ("triton", 1, 1024, 2048, torch.float32, LENGTHS),
    ("fla", 2, 256, 512, torch.bfloat16, (1000,)),
    ("fla", 1, 1024, 2048, torch.bfloat16, (1000,)),
]


def draw_inputs(T: int, H: int, K: int, V: int, N: int, dtype: torch.dtype, gate: float) -> list[Tensor]:
    """q, k, v, g, initial state; gate scales log-sigmoid draws (1/16: as GLA does), 0 leaves the logits."""
    draw = torch.Generator("cuda").manual_seed(T + K)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda")

    q, k, v = (normal(1, T, H, width).to(dtype) for width in (K, K, V))
    g = normal(1, T, H, K)
    g = torch.nn.functional.logsigmoid(g) * gate if gate else (4 * g).to(dtype)
    return [q, k, v, g, normal(N, H, K, V)]


def run_with_gradients(
    operator: Callable, inputs: list[Tensor], cu_seqlens: Tensor | None
) -> dict[str, Tensor]:
    """Output, final state and every gradient under one fixed random cotangent."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    q, k, v, g, state = inputs
    options = {"scale": q.shape[-1] ** -0.5, "initial_state": state, "output_final_state": True}
    o, last = operator(q, k, v, g, cu_seqlens=cu_seqlens, **options)
    draw = torch.Generator("cuda").manual_seed(7)
    do = torch.randn(o.shape, generator=draw, device="cuda").to(torch.bfloat16).to(o.dtype)
    dlast = torch.randn(last.shape, generator=draw, device="cuda").to(last.dtype)
    gradients = torch.autograd.grad([o, last], inputs, [do, dlast])
    return dict(zip(NAMES, (o.detach(), last.detach(), *gradients)))


def check_case(implementation: str, H: int, K: int, V: int, dtype: torch.dtype, T: int, mode: str) -> str:
    """One row: plain, strong (gates of -50 here and there), packed (cu_seqlens) or from the logits."""
    bounds = [0, T // 3, T // 3 + 1, T] if mode == "packed" else None
    cu_seqlens = torch.tensor(bounds, device="cuda") if bounds else None
    inputs = draw_inputs(
        T, H, K, V, len(bounds) - 1 if bounds else 1, dtype, 0 if mode == "logits" else 1 / 16
    )
    if mode == "strong":
        inputs[3] = torch.where(torch.rand_like(inputs[3]) < 0.1, -50.0, inputs[3])
    reference = gla_recurrent if T <= 65 else gla
    options = {} if T <= 65 else {"backend": "torch"}

    def exact(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **more) -> tuple[Tensor, Tensor]:
        return reference(q, k, v, log_decay(g, 16.0) if mode == "logits" else g, **more, **options)

    want = run_with_gradients(exact, [x.double() for x in inputs], cu_seqlens)

    def fast(q: Tensor, k: Tensor, v: Tensor, g: Tensor, **options) -> tuple[Tensor, Tensor]:
        if implementation == "triton":
            from models.ops.gla_triton import gla_triton

            return gla_triton(q, k, v, g, gate=(16.0, None) if mode == "logits" else None, **options)
        return importlib.import_module("fla.ops.gla").chunk_gla(q, k, v, g, **options)

    got = run_with_gradients(fast, inputs, cu_seqlens)
    errors = {n: ((got[n].double() - want[n]).norm() / want[n].norm().clamp_min(1e-30)).item() for n in NAMES}
    passed = all(error <= TOLERANCE[dtype] for error in errors.values())  # a NaN does not pass
    cells = " ".join(f"{errors[n]:9.1e}" for n in NAMES)
    kind = "bf16" if dtype == torch.bfloat16 else "fp32"
    return (
        f"{implementation:<7} {H}x{K}x{V:<5} {kind} T={T:<5} {mode:<7} {cells}  {'ok' if passed else 'FAIL'}"
    )


def check_group(
    implementation: str, H: int, K: int, V: int, dtype: torch.dtype, lengths: tuple[int, ...]
) -> list[str]:
    """All rows of one implementation at one shape; runs in a process of its own."""
    with suppress(ImportError):
        import fast_autotune  # noqa: F401  where present, narrows fla's autotuning for a short check
    cases = [(T, "plain") for T in lengths] + [(1000, "strong"), (1000, "packed")]
    cases += [(1000, "logits")] if implementation == "triton" else []
    rows = []
    for T, mode in cases:
        begin = time.time()
        try:
            row = check_case(implementation, H, K, V, dtype, T, mode)
        except Exception as error:
            what = f"FAIL {type(error).__name__}: {str(error)[:300]}"
            row = f"{implementation} {H}x{K}x{V} {dtype} T={T} {mode}: {what}"
        rows.append(f"{row}  {time.time() - begin:.0f} s")
        torch.cuda.empty_cache()
    return rows


def section(title: str, body: Callable[[], int | None]) -> int:
    """Failures of one part; prints what went wrong instead of stopping the others."""
    print(f"\n=== {title}", flush=True)
    begin = time.time()
    try:
        failures = body() or 0
    except Exception:
        print(f"SECTION FAILED: {traceback.format_exc(limit=6)}")
        failures = 1
    print(f"--- {title}: {time.time() - begin:.0f} s", flush=True)
    return failures


def print_errors(jobs: list[tuple[str, Future]]) -> int:
    """Prints the rows of every group; failures of our own kernels."""
    failures = 0
    print(f"relative error by norm against float64        {'':>8}" + " ".join(f"{n:>9}" for n in NAMES))
    for name, job in jobs:
        try:
            rows = job.result(timeout=280)
            print("\n".join(rows), flush=True)
            failures += name.startswith("triton") and sum("FAIL" in row for row in rows)
        except Exception as error:
            print(f"GROUP FAILED: {name} {type(error).__name__} {str(error)[:300]}")
            failures += name.startswith("triton")
    return failures


def print_levels() -> None:
    """Memory and time of a layer of GLA-1.3B, forward and backward, by level of recomputation."""
    for title, (H, K, V) in SHAPES.items():
        config = GLAConfig(hidden_size=2048, num_heads=4, intermediate_size=5632, num_hidden_layers=1)
        config.layers[0] |= {"num_heads": H, "head_k_dim": K, "head_v_dim": V, "query_scale": K**-0.5}
        for cost in probe_layers(config, GLABlock, torch.device("cuda"), autocast=True)[0]:
            memory = f"keeps {cost.kept:6.0f} bytes a token, {cost.working:6.0f} more in its backward pass"
            print(f"{title} {cost.level:<6} {memory}, {cost.seconds * 65536e3:6.2f} ms at 65,536 tokens")


def print_times(keep: bool = True) -> None:
    with suppress(ImportError):
        import fast_autotune  # noqa: F401
    for title, shape in SHAPES.items():
        print(f"H, K, V = {shape} ({title}), 65,536 tokens, bf16")
        cases = [("triton", False), ("triton", True)] if keep else [("triton", False)]
        for backend, kept in [*cases, ("fla", False)]:
            try:
                print(
                    "\n".join(str(row) for row in measure_operator(backend, 65536, *shape, keep=kept)),
                    flush=True,
                )
            except Exception as error:
                print(f"{backend}: FAIL {type(error).__name__}: {str(error)[:300]}")
            torch.cuda.empty_cache()
        for row in measure_kernels(65536, *shape):
            print(row)


def _name(group: tuple) -> str:
    implementation, *_, dtype, _ = group
    return f"{implementation}-{'bf16' if dtype == torch.bfloat16 else 'fp32'}"


@dataclass(frozen=True)
class Arguments:
    """GLA's kernels on a GPU: errors, memory, times, settings.

    seconds=N     after which no candidate is begun (240)
    out=DIR       where the best settings are written ($OUT, else output)
    sections=...  errors,levels,times,tune
    groups=...    of the errors: triton-bf16,triton-fp32,fla-bf16
    """

    seconds: float = 240.0
    out: str = os.environ.get("OUT", "output")
    sections: str = "errors,levels,times,tune"
    groups: str = "triton-bf16,triton-fp32,fla-bf16"


def act(arguments: Arguments) -> int:
    sections, groups = arguments.sections.split(","), arguments.groups.split(",")
    for key, given, known in (
        ("sections", sections, Arguments.sections.split(",")),
        ("groups", groups, list(map(_name, GROUPS))),
    ):
        if unknown := set(given).difference(known):
            raise ValueError(f"{key}={min(unknown)}: expected some of {', '.join(dict.fromkeys(known))}")
    if not torch.cuda.is_available():
        raise ValueError("needs a CUDA device, and torch sees none")
    begin = time.time()
    triton_version = importlib.import_module("triton").__version__
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton_version}")
    failures = 0
    if "errors" in sections:
        context, workers = multiprocessing.get_context("spawn"), tune_kernels.default_workers()
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            wanted = [group for group in GROUPS if _name(group) in groups]
            jobs = [(_name(group), pool.submit(check_group, *group)) for group in wanted]
            failures += section("errors", lambda: print_errors(jobs))
    if "levels" in sections:
        failures += section("levels", print_levels)
    if "times" in sections:
        failures += section("times", print_times)
    if "tune" in sections:
        bases = {shape: tune_kernels.base_settings(shape) for shape in SHAPES.values()}
        options = 65536, Path(arguments.out), begin + arguments.seconds, tune_kernels.default_workers()
        failures += section("tune", lambda: tune_kernels.tune(bases, *options))
    print(f"total {time.time() - begin:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_command(Arguments, act))
