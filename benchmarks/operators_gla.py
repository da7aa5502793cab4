"""Gated linear attention at the shapes that matter: each kernel and the whole operator, TFLOP/s and GB/s.

    python -m benchmarks.operators_gla tokens=65536

`measure_operator` and `measure_kernels` make the rows, for benchmarks/operators.py and tune_kernels.py too.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ops.gla import gla_gated

# heads, K, V: a layer of GLA-1.3B as published, and with its heads merged into one
SHAPES = {"four heads": (4, 256, 512), "one head": (1, 1024, 2048)}


@dataclass(frozen=True)
class Row:
    name: str
    milliseconds: float
    tflop: float  # 10 ** 12 floating point operations
    gigabytes: float  # read and written once each

    def __str__(self) -> str:
        rate, bandwidth = self.tflop / self.milliseconds * 1e3, self.gigabytes / self.milliseconds * 1e3
        return f"{self.name:<34} {self.milliseconds:8.3f} ms {rate:7.0f} TFLOP/s {bandwidth:7.0f} GB/s"


def time_call(call: Callable[[], object], repeats: int = 7) -> float:
    """Median milliseconds of a call on the GPU, after two calls to warm up."""
    for _ in range(2):
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)
    ]
    for start, stop in events:
        start.record()
        call()
        stop.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(stop) for start, stop in events)


def make_inputs(
    tokens: int, H: int, K: int, V: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0
) -> list[Tensor]:
    """q, k, v and the gate's logits [1, T, H, ...] on the GPU, wanting gradients."""
    draw = torch.Generator("cuda").manual_seed(seed)

    def normal(width: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(1, tokens, H, width, generator=draw, device="cuda", dtype=torch.float32).to(dtype)

    return [normal(width, dtype).requires_grad_() for width in (K, K, V, K)]


def operator_flops(tokens: int, H: int, K: int, V: int) -> float:
    """TFLOP of a forward pass without what happens inside chunks: keys into the state, queries out of it."""
    return 4 * tokens * H * K * V / 1e12


def measure_operator(backend: str, tokens: int, H: int, K: int, V: int, keep: bool = False) -> list[Row]:
    """Forward and backward of the whole operator through one backend."""
    inputs = make_inputs(tokens, H, K, V)
    do = torch.randn_like(inputs[2])

    def forward() -> Tensor:
        return gla_gated(*inputs, scale=K**-0.5, backend=backend, keep=keep)[0]

    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    backward = _time_backward(forward(), inputs, do)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9
    both = operator_flops(tokens, H, K, V)
    element = inputs[0].element_size()
    data = tokens * H * (2 * K * element + 2 * V * element + K * element) / 1e9
    label = f"{backend}{' keep' if keep else ''}"
    return [
        Row(f"{label} forward", time_call(forward), both, data),
        Row(f"{label} backward (peak {peak:.1f} GB)", backward, 2 * both, 2 * data),
    ]


def _time_backward(o: Tensor, inputs: list[Tensor], do: Tensor) -> float:
    return time_call(lambda: torch.autograd.grad(o, inputs, do, retain_graph=True))


def kernel_calls(
    tokens: int, H: int, K: int, V: int, settings: dict | None = None, real: bool = True
) -> dict[str, Callable[[], object]]:
    """A call for every kernel of ours; settings override the configured ones.

    What a kernel reads is what the kernels before it wrote, or memory as it comes (real=False, to compile).
    """
    from models.ops import gla_triton as kernels

    q, k, v, g = (x.detach() for x in make_inputs(tokens, H, K, V))
    settings = settings or kernels.settings_for(q, v)
    layout = kernels.chunk_layout(1, tokens, None, settings["chunk"]["size"], q.device)
    launch = kernels.Launcher(q, v, layout, kernels.Options(K**-0.5, (16.0, None), False, False), settings)
    do = make_inputs(tokens, H, K, V, seed=1)[2].detach()
    if real:
        queries, keys, b, total = launch.prepare(q, k, g)
        scores, dscores = launch.scores(q, k, b, queries, keys, total), launch.dscores(do, v)
        states, _ = launch.march(keys, v, total, None, False, reverse=False)
        dstates, _ = launch.march(queries, do, total, None, False, reverse=True)
        dqueries, dkeys, product = launch.grad(do, v, states, dstates)
    else:
        queries, keys, dqueries, dkeys, b = q, k, q, k, torch.empty_like(q, dtype=torch.float32)
        total = product = b.new_empty(layout.num_chunks, H, K)
        scores = dscores = q.new_empty(1, tokens, H, layout.size)
        states = dstates = q.new_empty(layout.num_chunks, H, K, V)
    return {
        "prepare": lambda: launch.prepare(q, k, g),
        "scores": lambda: launch.scores(q, k, b, queries, keys, total),
        "march": lambda: launch.march(keys, v, total, None, False, reverse=False),
        "march reverse": lambda: launch.march(queries, do, total, None, False, reverse=True),
        "mix": lambda: launch.mix(queries, states, scores, v, transposed=False),
        "mix transposed": lambda: launch.mix(keys, dstates, scores, do, transposed=True),
        "grad": lambda: launch.grad(do, v, states, dstates),
        "dscores": lambda: launch.dscores(do, v),
        "intra_backward": lambda: launch.intra_backward(q, k, g, b, total, dscores, dqueries, dkeys, product),
    }


def kernel_work(kernel: str, tokens: int, H: int, K: int, V: int, chunk: int) -> tuple[float, float]:
    """TFLOP and GB of one kernel: matrix products it needs, and every input and output once."""
    state = 2 * tokens * H * K * V
    pairs = 2 * tokens * H * (chunk + 64) / 2  # times the width of what is compared or summed
    of_k, of_v, states = 2 * tokens * H * K, 2 * tokens * H * V, 2 * tokens / chunk * H * K * V
    of_scores = 2 * tokens * H * chunk
    flops, data = {
        "prepare": (0, 3 * of_k + 4 * of_k),
        "scores": (pairs * K, 2 * of_k + of_scores),
        "march": (state, of_k + of_v + states),
        "mix": (state + pairs * V, of_k + 2 * of_v + states + of_scores / 2),
        "grad": (2 * state, 2 * of_v + 2 * states + 2 * of_k),
        "dscores": (pairs * V, 2 * of_v + of_scores),
        "intra_backward": (2 * pairs * K, 10 * of_k + of_scores / 2),
    }[kernel.split()[0]]
    return flops / 1e12, data / 1e9


def measure_kernels(tokens: int, H: int, K: int, V: int, settings: dict | None = None) -> list[Row]:
    """Every kernel of ours on its own."""
    from models.ops import gla_triton as kernels

    if settings is None:
        probe = torch.empty(1, 1, H, K, device="cuda", dtype=torch.bfloat16)
        settings = kernels.settings_for(probe, probe.new_empty(1, 1, H, V))
    rows = []
    for name, call in kernel_calls(tokens, H, K, V, settings).items():
        rows.append(
            Row(name, time_call(call), *kernel_work(name, tokens, H, K, V, settings["chunk"]["size"]))
        )
    return rows


def main(arguments: list[str]) -> None:
    tokens = int(dict(argument.split("=", 1) for argument in arguments).get("tokens", 65536))
    for title, shape in SHAPES.items():
        print(f"\nGLA, {title}: H, K, V = {shape}, {tokens} tokens, bf16, {torch.cuda.get_device_name()}")
        for backend in ("triton", "fla"):
            for row in measure_operator(backend, tokens, *shape):
                print(row)
        for row in measure_kernels(tokens, *shape):
            print(row)


if __name__ == "__main__":
    main(sys.argv[1:])
