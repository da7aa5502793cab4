"""Checks the SSD and convolution kernels on a GPU against float64, then times them at 65,536 tokens.

    python benchmarks/gpu_check_ssd.py [quick]

Prints a table of relative errors by norm (forward and every gradient; NaN is a FAIL), then times of whole
passes and of each kernel with a few launch configurations, beside mamba_ssm where it is installed. A section
that fails is printed and the others go on.
"""

import contextlib
import multiprocessing
import sys
import time
import traceback
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
with contextlib.suppress(ImportError):  # narrows the autotuners of the packages measured beside ours
    import fast_autotune  # noqa: F401

import torch

from models.ops import conv_triton, ssd_triton
from models.ops.conv import causal_conv1d
from models.ops.ssd import ssd, ssd_packed

LENGTHS = (1, 63, 64, 65, 1000, 8192)
TOKENS, HEADS, HEAD_DIM = 65536, 64, 64
LIMIT = {torch.bfloat16: 2e-2, torch.float32: 1e-3}
OUTPUTS = {"ROWS": 64, "BLOCK_K": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
SCORES = {"ROWS": 64, "num_warps": 4, "num_stages": 3}
CANDIDATES = {
    "states": [
        {"HEADS": 1, "BLOCK_K": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
        {"HEADS": 2, "BLOCK_K": 64, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3},
    ],
    "outputs": [
        OUTPUTS | {"maxnreg": 128},
        OUTPUTS | {"maxnreg": 168},
        OUTPUTS | {"BLOCK_K": 32, "maxnreg": 128},
    ],
    "score_gradients": [SCORES | {"maxnreg": limit} for limit in (168, None, 128)],
    "pass_gradients": [
        {"BLOCK": 256, "num_warps": 1},
        {"BLOCK": 128, "num_warps": 1},
        {"BLOCK": 2048, "num_warps": 8},
    ],
}
CONVOLUTIONS = [
    {"TOKENS": 128, "BLOCK": 256, "num_warps": 2},
    {"TOKENS": 128, "BLOCK": 256, "num_warps": 1},
    {"TOKENS": 64, "BLOCK": 128, "num_warps": 1},
]


# --- correctness


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
    failures = 0
    for state_size in state_sizes:
        for dtype in dtypes:
            for length in lengths:
                for packed in packings:
                    if packed and length < 63:
                        continue
                    cu_seqlens = offsets_of(length) if packed else None
                    inputs = ssd_inputs(length, state_size, dtype, len(cu_seqlens) - 1 if packed else 1)
                    options = {"output_final_state": True, "cu_seqlens": cu_seqlens, "chunk_size": 64}
                    exact = gradients_of(partial(ssd, **options, backend="torch"), inputs, torch.float64)
                    for backend in backends:
                        label = f"{backend} N={state_size} {str(dtype)[6:]} T={length} packed={packed}"
                        try:
                            run = dict(options, chunk_size=256, backend=backend)
                            found = gradients_of(partial(ssd, **run), inputs)
                            failures += not report_errors(label, found, exact, LIMIT[dtype])
                        except Exception as error:
                            failures += 1
                            print(f"FAIL {label} {type(error).__name__}: {str(error)[:300]}", flush=True)
    return failures


def check_conv(backends, dtypes=(torch.bfloat16, torch.float32), lengths=LENGTHS):
    failures = 0
    for dtype in dtypes:
        for length in lengths:
            for packed in (False, True):
                if packed and length < 63:
                    continue
                cu_seqlens = offsets_of(length) if packed else None
                draw = torch.Generator().manual_seed(0)
                sequences = len(cu_seqlens) - 1 if packed else 1
                shapes = {"x": (1, length, 320), "weight": (320, 4), "bias": (320,)}
                shapes["initial_state"] = (sequences, 320, 3)
                inputs = {n: torch.randn(s, generator=draw).to(dtype).cuda() for n, s in shapes.items()}

                def run(backend):
                    def convolve(x, **others):  # a slice of something wider, as in the model
                        wide = torch.cat([x, x], dim=2)[:, :, 160:480]
                        options = {"output_final_state": True, "cu_seqlens": cu_seqlens}  # noqa: B023
                        options["activation"] = "silu"
                        return causal_conv1d(wide, **others, **options, backend=backend)

                    return convolve

                exact = gradients_of(run("torch"), inputs, torch.float64)
                for backend in backends:
                    if backend == "mamba_ssm" and packed:
                        continue
                    label = f"conv {backend} {str(dtype)[6:]} T={length} packed={packed}"
                    try:
                        found = gradients_of(run(backend), inputs)
                        failures += not report_errors(label, found, exact, LIMIT[dtype])
                    except Exception as error:
                        failures += 1
                        print(f"FAIL {label} {type(error).__name__}: {str(error)[:300]}", flush=True)
    return failures


# --- time


def milliseconds(function, repeats=5):
    function()
    torch.cuda.synchronize()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return sorted(times)[len(times) // 2]


def big_inputs(state_size, tokens=TOKENS):
    torch.manual_seed(0)
    width = HEADS * HEAD_DIM
    wide = torch.randn(1, tokens, width + 2 * state_size, device="cuda", dtype=torch.bfloat16)
    x, B, C = wide.split([width, state_size, state_size], dim=2)
    dt = torch.nn.functional.softplus(torch.randn(1, tokens, HEADS, device="cuda") - 3)
    A = -torch.rand(HEADS, device="cuda") * 15 - 1
    return {
        "x": x.unflatten(2, (HEADS, HEAD_DIM)),
        "dt": dt,
        "A": A,
        "B": B.unsqueeze(2),
        "C": C.unsqueeze(2),
        "D": torch.ones(HEADS, device="cuda"),
    }


def time_whole(backend, state_size):
    inputs = {n: t.detach().requires_grad_() for n, t in big_inputs(state_size).items()}
    dy = torch.randn(1, TOKENS, HEADS, HEAD_DIM, device="cuda", dtype=torch.bfloat16)

    def forward():
        return ssd(**inputs, backend=backend)[0]

    y = forward()
    forward_ms = milliseconds(lambda: forward())
    backward_ms = milliseconds(lambda: torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True))
    torch.cuda.reset_peak_memory_stats()
    base = torch.cuda.memory_allocated()
    torch.autograd.grad(y, list(inputs.values()), dy, retain_graph=True)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**30
    times = f"forward {forward_ms:.3f} ms, backward {backward_ms:.3f} ms, backward peak {peak:.2f} GiB"
    print(f"{backend:10s} N={state_size} {times}")


class Pieces:
    """The launches of one call of the operator, one by one."""

    def __init__(self, state_size, chunk, tokens=TOKENS):
        self.i = big_inputs(state_size, tokens)
        config = dict(ssd_triton.CONFIGS[2], chunk={"Q": chunk})
        ssd_triton.CONFIGS[2] = config
        self.shape = ssd_triton.Shape(self.i["x"], self.i["B"], None)
        self.dy = torch.randn_like(self.i["x"], memory_format=torch.contiguous_format)
        self.decays = ssd_triton.running_decays(self.shape, self.i["dt"], self.i["A"])
        self.scores = ssd_triton.chunk_scores(self.shape, self.i["B"], self.i["C"])
        self.states = self.run_states(True)
        self.gradients = self.states.clone()
        self.out = torch.empty_like(self.dy)
        self.keys = torch.empty_like(self.i["B"], memory_format=torch.contiguous_format)

    def run_states(self, forward=True):
        return ssd_triton.chunk_states(self.shape, self.i["x"], self.i["B"], self.decays, forward=forward)

    def run_outputs(self, forward):
        ssd_triton.outputs(
            self.shape,
            self.i["x"],
            self.i["C"],
            self.states,
            self.scores,
            self.i["D"],
            self.decays,
            self.out,
            forward=forward,
        )

    def run_keys(self, queries):
        i = self.i
        return ssd_triton.key_gradients(
            self.shape,
            i["x"],
            i["B"],
            i["C"],
            self.states,
            self.scores,
            self.decays,
            self.keys,
            queries=queries,
        )

    def table(self):
        """Kernel -> [(label, function, FLOPs, bytes)]."""
        state_size, chunk = self.shape.state_size, self.shape.chunk
        tokens = self.shape.length
        rows, state = tokens * HEADS * HEAD_DIM * 2, self.states.numel() * 2
        with_state = 2.0 * tokens * HEADS * HEAD_DIM * state_size
        intra = 1.0 * tokens * chunk * HEADS * HEAD_DIM
        s, d = self.shape, self.decays
        sums = None
        with contextlib.suppress(Exception):
            sums = self.sums()
        return {
            "states": [
                (f"states fw={f}", lambda f=f: self.run_states(f), with_state, rows + state)
                for f in (True, False)
            ],
            "outputs": [
                (f"outputs fw={f}", lambda f=f: self.run_outputs(f), with_state + intra, 2 * rows + state)
                for f in (True, False)
            ],
            "score_gradients": [
                (
                    "score_gradients",
                    lambda: ssd_triton.score_gradients(s, self.i["x"], self.dy, self.scores, d, True),
                    intra,
                    2 * rows,
                )
            ],
            "key_gradients": [
                (f"key_gradients q={q}", lambda q=q: self.run_keys(q), with_state, rows + state)
                for q in (True, False)
            ],
            "pass": [
                ("pass_states", lambda: ssd_triton.pass_states(s, self.states, d, None, False), 0, 2 * state)
            ],
            "pass_gradients": [
                (
                    "pass_gradients",
                    lambda: ssd_triton.pass_gradients(s, self.gradients, self.states, d, None, None),
                    0,
                    3 * state,
                )
            ],
            "steps": [
                (
                    "step_gradients",
                    lambda: ssd_triton.step_gradients(s, self.i["dt"], self.i["A"], d, *sums),
                    0,
                    tokens * HEADS * 32,
                )
            ],
            "others": [
                (
                    "running_decays",
                    lambda: ssd_triton.running_decays(s, self.i["dt"], self.i["A"]),
                    0,
                    tokens * HEADS * 12,
                ),
                (
                    "chunk_scores",
                    lambda: ssd_triton.chunk_scores(s, self.i["B"], self.i["C"]),
                    1.0 * tokens * chunk * state_size,
                    0,
                ),
            ],
        }

    def sums(self):
        _, row_sums, column_sums, _ = ssd_triton.score_gradients(
            self.shape, self.i["x"], self.dy, self.scores, self.decays, True
        )
        read, added = self.run_keys(True), self.run_keys(False)
        parts, _ = ssd_triton.pass_gradients(self.shape, self.gradients, self.states, self.decays, None, None)
        return (row_sums, column_sums, read, added), parts


def time_pieces(state_size, chunk, tokens=TOKENS, only=None):
    """Times every kernel with every candidate; with few tokens this only fills the compiler's cache."""
    pieces = Pieces(state_size, chunk, tokens)
    for kernel, rows in pieces.table().items():
        if only and kernel not in only:
            continue
        for candidate in CANDIDATES.get(kernel, [None]):
            if candidate:
                pieces.shape.config[kernel] = dict(candidate)
            for label, function, flops, moved in rows:
                try:
                    ms = milliseconds(function, repeats=5 if tokens == TOKENS else 1)
                except Exception as error:
                    print(
                        f"FAIL {label} N={state_size} Q={chunk} {candidate}: {str(error)[:200]}", flush=True
                    )
                    continue
                if tokens == TOKENS:
                    rate = f"{flops / ms / 1e9:6.0f} TFLOP/s {moved / ms / 1e6:6.0f} GB/s"
                    print(
                        f"{label:22s} N={state_size} Q={chunk} {ms:7.3f} ms {rate}  {candidate or ''}",
                        flush=True,
                    )
        pieces.shape.config[kernel] = ssd_triton.CONFIGS[2].get(kernel)


def time_conv(backend, channels, tokens=TOKENS, config=None):
    if config is not None:
        conv_triton.FORWARD.update(config)
        conv_triton.BACKWARD.update(config)
    x = torch.randn(1, tokens, channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    bias = torch.randn(channels, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = causal_conv1d(x, weight, bias, activation="silu", backend=backend)[0]
    dy = torch.randn_like(y)
    forward = milliseconds(lambda: causal_conv1d(x, weight, bias, activation="silu", backend=backend))
    backward = milliseconds(lambda: torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True))
    moved = 2 * x.numel() / 1e6
    print(
        f"conv {backend:10s} D={channels} forward {forward:.3f} ms ({2 * moved / forward:.0f} GB/s), "
        f"backward {backward:.3f} ms ({3 * moved / backward:.0f} GB/s) {config or ''}",
        flush=True,
    )


# --- the run


def _warm(job):
    name, arguments = job
    with contextlib.redirect_stdout(None), contextlib.suppress(Exception):
        globals()[name](*arguments)


def warm_compiler_cache(workers=16):
    """Compiles everything of ours in parallel processes; the kernels come from the disk cache afterwards."""
    jobs = [("check_ssd", (("triton",), (n,), (d,), (65,), (p,)))
            for n in (128, 512) for d in LIMIT for p in (False, True)]  # fmt: skip
    jobs += [("check_conv", (("triton",), (dtype,), (65,))) for dtype in LIMIT]
    jobs += [("time_conv", ("triton", 4352, 1024, config)) for config in CONVOLUTIONS]
    jobs += [("time_pieces", (n, 256, 1024, (k,))) for k in CANDIDATES for n in (128, 512)]
    jobs += [
        ("time_pieces", (n, 256, 1024, ("pass", "key_gradients", "steps", "others"))) for n in (128, 512)
    ]
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_warm, jobs))


def section(title, function, *arguments):
    print(f"== {title} [{time.time() - START:.0f} s]", flush=True)
    try:
        return function(*arguments)
    except Exception:
        traceback.print_exc(limit=4)
        return 1


def main():
    quick = "quick" in sys.argv[1:]
    print(torch.cuda.get_device_name(), torch.__version__)
    section("compiling", warm_compiler_cache)
    dtypes = (torch.bfloat16, torch.float32)
    failures = section("SSD, ours", check_ssd, ("triton",), (128, 512), dtypes, LENGTHS) or 0
    failures += section("SSD, packed in one tensor", check_packed) or 0
    failures += section("convolution", check_conv, ("triton",)) or 0
    print(f"== {failures} failures of ours")
    for n in (128, 512):
        section(f"whole passes N={n}", time_whole, "triton", n)
    for channels in (4352, 5120):
        for config in CONVOLUTIONS[: 1 if quick else None]:
            section("convolution", time_conv, "triton", channels, TOKENS, config)
    if not quick:
        for n in (128, 512):
            section(f"kernels N={n}", time_pieces, n, 256)
        section("convolution", time_conv, "mamba_ssm", 4352)
        for n in (128, 512):
            section(f"whole passes N={n}", time_whole, "mamba_ssm", n)
    print(f"done in {time.time() - START:.0f} s")


START = time.time()
if __name__ == "__main__":
    main()
