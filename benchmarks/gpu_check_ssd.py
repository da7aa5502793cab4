"""Checks the SSD and convolution kernels on a GPU against float64, then times them at 65,536 tokens.

    python -m benchmarks.gpu_check_ssd [quick=true] [seconds=600]

Prints a table of relative errors by norm (forward and every gradient; NaN is a FAIL), then times of whole
passes and of each kernel (benchmarks/gpu_time_ssd.py; benchmarks/tune_ssd.py tunes them), beside mamba_ssm
where it is installed. A section that fails is printed and the others go on; one that would begin after
`seconds` is left out, and says so. mamba_ssm's own errors: benchmarks/gpu_check_backends.py.
Exit status 1 if a check or a timing of ours failed or was left out.
"""

import contextlib
import itertools
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

with contextlib.suppress(ImportError):  # narrows the autotuners of the packages measured beside ours
    import fast_autotune  # noqa: F401

import torch

from benchmarks.gpu_time_ssd import CONVOLUTIONS, TOKENS, time_conv, time_pieces, time_whole
from models.command_line import run_command
from models.ops.conv import causal_conv1d
from models.ops.ssd import ssd, ssd_packed

HEAD_DIM = 64
LENGTHS = (1, 63, 64, 65, 1000, 8192)
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
PACKAGE_LIMIT = {torch.bfloat16: 2e-2, torch.float32: 5e-3}  # their fp32 products are tf32


def ssd_inputs(length, state_size, dtype, sequences=1, heads=8, groups=2):
    """Inputs rounded to `dtype`, so that only the kernels' own error counts; realistic steps and decays."""
    draw = torch.Generator().manual_seed(length + state_size)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    dt = torch.nn.functional.softplus(normal(1, length, heads) - 3)
    low = {
        "x": normal(1, length, heads, HEAD_DIM),
        "B": normal(1, length, groups, state_size),
        "C": normal(1, length, groups, state_size),
    }
    full = {
        "dt": dt,
        "A": -torch.rand(heads, generator=draw, dtype=torch.float64) * 15 - 1,
        "D": normal(heads),
        "initial_state": normal(sequences, heads, HEAD_DIM, state_size),
    }
    low = {name: t.to(dtype) for name, t in low.items()}
    return {name: t.cuda() for name, t in (low | {name: t.float() for name, t in full.items()}).items()}


def gradients_of(function, inputs, dtype=None):
    """Results and gradients of a fixed random function of them, all in float64."""
    inputs = {
        name: (t if dtype is None else t.to(dtype)).detach().requires_grad_() for name, t in inputs.items()
    }
    results = function(**inputs)
    draw = torch.Generator(device="cuda").manual_seed(0)
    loss = 0.0
    for result in results:
        weight = torch.randn(result.shape, generator=draw, dtype=torch.float64, device="cuda")
        # the weights must be the same numbers for every dtype, or the rounding of the loss counts as error
        loss = loss + (result.double() * weight.to(torch.bfloat16)).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    found = dict(zip(["y", "state"], results)) | {"d" + name: g for name, g in zip(inputs, gradients)}
    return {name: t.double() for name, t in found.items()}


def report_errors(label, found, exact, limit):
    errors = {n: ((found[n] - exact[n]).norm() / exact[n].norm().clamp_min(1e-30)).item() for n in exact}
    good = all(e < limit for e in errors.values())  # false for NaN
    cells = " ".join(f"{n.replace('initial_state', 'h0')}={e:.1e}" for n, e in errors.items())
    print(f"{'ok  ' if good else 'FAIL'} {label:46s} {cells}", flush=True)
    return good


def check_packed():
    """The packed operator gives the bits of the plain one, and its gradient is one tensor."""
    inputs = ssd_inputs(1000, 128, torch.bfloat16)

    def packed(x, dt, A, B, C, **options):
        xBC = torch.cat([t.flatten(2) for t in (x, B, C)], dim=2)
        return ssd_packed(xBC, dt, A, groups=2, state_size=128, **options)

    options = {"output_final_state": True, "backend": "triton"}
    exact = gradients_of(partial(ssd, **options), inputs)
    return not report_errors("packed", gradients_of(partial(packed, **options), inputs), exact, 1e-6)


def offsets_of(length):
    return torch.tensor(sorted({0, 1, length // 3, length // 3, length // 2 + 1, length}), device="cuda")


def check_ssd(backends, state_sizes, dtypes, lengths, packings=(False, True)):
    """Failures over every combination; a packed row has at least two sequences, so it needs 63 tokens."""
    cases = itertools.product(state_sizes, dtypes, lengths, packings)
    return sum(check_ssd_case(backends, *case) for case in cases if case[2] >= 63 or not case[3])


def check_ssd_case(backends, state_size, dtype, length, packed):
    cu_seqlens = offsets_of(length) if packed else None
    inputs = ssd_inputs(length, state_size, dtype, len(cu_seqlens) - 1 if packed else 1)
    failures = 0
    for backend in backends:
        # mamba_ssm has one state a row, and none for each of several packed sequences
        states = backend != "mamba_ssm" or not packed
        given = {n: t for n, t in inputs.items() if states or n != "initial_state"}
        options = {"output_final_state": states, "cu_seqlens": cu_seqlens}
        exact = partial(_results, ssd, **options, backend="torch", chunk_size=64)
        found = partial(_results, ssd, **options, backend=backend)
        label = f"{backend} N={state_size} {str(dtype)[6:]} T={length} packed={packed}"
        failures += not compare(label, found, exact, given, backend, dtype)
    return failures


def _results(function, **arguments):
    return [result for result in function(**arguments) if result is not None]


def compare(label, found, exact, inputs, backend, dtype):
    """Whether a function and its gradients are near those of an exact one, which gets float64."""
    limit = (PACKAGE_LIMIT if backend == "mamba_ssm" else LIMIT)[dtype]
    try:
        wanted = gradients_of(exact, inputs, torch.float64)
        return report_errors(label, gradients_of(found, inputs), wanted, limit)
    except Exception as error:
        # a package's tiles for fp32 at a large state may not fit a multiprocessor: it offers no fp32 then
        none = backend == "mamba_ssm" and "OutOfResources" in type(error).__name__
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        print(f"{'none' if none else 'FAIL'} {label} {reason}", flush=True)
        return none


def check_conv(backends, dtypes=(torch.bfloat16, torch.float32), lengths=LENGTHS):
    cases = itertools.product(dtypes, lengths, (False, True))
    return sum(check_conv_case(backends, *case) for case in cases if case[1] >= 63 or not case[2])


def check_conv_case(backends, dtype, length, packed):
    cu_seqlens = offsets_of(length) if packed else None
    draw = torch.Generator().manual_seed(0)
    sequences = len(cu_seqlens) - 1 if packed else 1
    shapes = {"x": (1, length, 320), "weight": (320, 4), "bias": (320,), "initial_state": (sequences, 320, 3)}
    inputs = {n: torch.randn(s, generator=draw).to(dtype).cuda() for n, s in shapes.items()}

    def convolve(x, *, backend, **others):  # a slice of something wider, as in the model
        wide = torch.cat([x, x], dim=2)[:, :, 160:480]
        options = {"output_final_state": True, "cu_seqlens": cu_seqlens, "activation": "silu"}
        return causal_conv1d(wide, **others, **options, backend=backend)

    failures = 0
    for backend in backends:
        # causal_conv1d has no initial state for each of several packed sequences
        states = backend != "mamba_ssm" or not packed
        given = {n: t for n, t in inputs.items() if states or n != "initial_state"}
        label = f"conv {backend} {str(dtype)[6:]} T={length} packed={packed}"
        found, exact = (partial(convolve, backend=name) for name in (backend, "torch"))
        failures += not compare(label, found, exact, given, backend, dtype)
    return failures


# --- the run


def _warm(function, *arguments):
    with contextlib.redirect_stdout(None), contextlib.suppress(Exception):
        function(*arguments)


def warm_compiler_cache(workers=16):
    """Compiles everything of ours in parallel processes; the kernels come from the disk cache afterwards."""
    jobs = [(check_ssd, ("triton",), (n,), (d,), (65,), (p,))
            for n in (128, 512) for d in LIMIT for p in (False, True)]  # fmt: skip
    jobs += [(check_conv, ("triton",), (dtype,), (65,)) for dtype in LIMIT]
    jobs += [(time_conv, "triton", 4352, 1024, config) for config in CONVOLUTIONS]
    jobs += [(time_pieces, n, 256, 1024) for n in (128, 512)]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        for job in [pool.submit(_warm, *one) for one in jobs]:
            job.result()


def section(until, title, function, *arguments):
    """Failures of one part; prints what went wrong and lets the others go on. No time for it is one too."""
    print(f"== {title}", flush=True)
    if time.time() > until:
        print("left out: the time is over")
        return 1
    try:
        return function(*arguments) or 0
    except Exception:
        traceback.print_exc(limit=4)
        return 1


@dataclass(frozen=True)
class Arguments:
    """SSD's and the convolution's kernels on a GPU: errors, then times.

    quick=true   whole passes alone are timed, not each kernel or mamba_ssm
    seconds=N    after which no section is begun (600)
    """

    quick: bool = False
    seconds: float = 600.0


def act(arguments):
    if not torch.cuda.is_available():
        raise ValueError("needs a CUDA device, and torch sees none")
    begin = time.time()
    run = partial(section, begin + arguments.seconds)
    print(torch.cuda.get_device_name(), torch.__version__)
    run("compiling", warm_compiler_cache)
    dtypes = (torch.bfloat16, torch.float32)
    failures = run("SSD, ours", check_ssd, ("triton",), (128, 512), dtypes, LENGTHS)
    failures += run("SSD, packed in one tensor", check_packed)
    failures += run("convolution", check_conv, ("triton",))
    print(f"== {failures} failures of ours")
    for n in (128, 512):
        failures += run(f"whole passes N={n}", time_whole, "triton", n)
    for channels in (4352, 5120):
        for config in CONVOLUTIONS[: 1 if arguments.quick else None]:
            failures += run("convolution", time_conv, "triton", channels, TOKENS, config)
    if not arguments.quick:
        for n in (128, 512):
            failures += run(f"kernels N={n}", time_pieces, n, 256)
        run("convolution", time_conv, "mamba_ssm", 4352)  # a package that is not there is no failure
        for n in (128, 512):
            run(f"whole passes N={n}", time_whole, "mamba_ssm", n)
    print(f"done in {time.time() - begin:.0f} s")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(run_command(Arguments, act))
