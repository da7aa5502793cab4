"""Matrix products of the 1.3B models in bf16 and in fp8, casts included; what the casts and each kernel take.

    python -m benchmarks.products [tokens=65536]

`bf16` and `fp8` are whole products as training runs them (`models/ops/matmul.py`), from bf16 activations and
fp32 weights. The other columns are parts of fp8: quantising the left factor, quantising the weights, and
`torch._scaled_mm` with a scale a row (fast accumulation on and off) or one scale a matrix. Median
milliseconds; 20 s in all.
"""

import sys
from collections.abc import Callable
from contextlib import contextmanager

import torch

from benchmarks.operators_gla import time_call
from models.ops import matmul

# [D_out, D_in] of a layer's weights
OUTPUTS = {
    "GLA q, k": (1024, 2048),
    "GLA v, g, o; expanded q, k": (2048, 2048),
    "GLA gate, up": (5632, 2048),
    "GLA down": (2048, 5632),
    "Mamba2 z": (4096, 2048),
    "Mamba2 xBC": (4352, 2048),
    "Mamba2 xBC, expanded": (5120, 2048),
    "Mamba2 out": (2048, 4096),
}
# D_out of the weights whose input gradients add up, and their common D_in
GRADIENTS = {
    "GLA q, k, v, g and gate": ((1024, 1024, 2048, 2048, 16), 2048),
    "GLA o": ((2048,), 2048),
    "GLA gate, up": ((5632, 5632), 2048),
    "GLA down": ((2048,), 5632),
    "Mamba2 z, xBC, dt": ((4096, 4352, 64), 2048),
    "Mamba2 out": ((2048,), 4096),
}
COLUMNS = ("bf16", "fp8", "cast left", "cast right", "row fast", "row", "one fast", "one")


@contextmanager
def _fp8():
    matmul.set_products("fp8")
    try:
        yield
    finally:
        matmul.set_products("bf16")


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.float32).to(dtype)


def _kernels(left: matmul.Scaled, right: matmul.Scaled) -> dict[str, float]:
    """Milliseconds of `_scaled_mm` with both kinds of scales and both kinds of accumulation."""
    one = left.scale.new_ones(1, 1)
    scales = {"row": (left.scale, right.scale.view(1, -1)), "one": (one, one)}
    times = {}
    for kind, (scale_a, scale_b) in scales.items():
        for fast in (True, False):
            options = {"scale_a": scale_a, "scale_b": scale_b, "use_fast_accum": fast}
            times[f"{kind} fast" if fast else kind] = time_call(
                lambda options=options: torch._scaled_mm(
                    left.values, right.values.T, out_dtype=torch.bfloat16, **options
                )
            )
    return times


def _row(
    call: Callable[[], torch.Tensor],
    quantise_left: Callable[[], matmul.Scaled],
    quantise_right: Callable[[], matmul.Scaled],
) -> dict[str, float]:
    times = {"bf16": time_call(call)}
    with _fp8():
        times["fp8"] = time_call(call)
    times |= {"cast left": time_call(quantise_left), "cast right": time_call(quantise_right)}
    return times | _kernels(quantise_left(), quantise_right())


def measure_output(tokens: int, rows: int, columns: int) -> dict[str, float]:
    """`hidden @ W.T`; the whole product quantises its input anew, though several may share it."""
    hidden, weight = draw(tokens, columns, dtype=torch.bfloat16), draw(rows, columns)
    return _row(
        lambda: matmul.product(hidden.view_as(hidden), weight, None, None),
        lambda: matmul.quantise_rows([hidden]),
        lambda: matmul.quantise_rows([weight]),
    )


def measure_gradient(tokens: int, widths: tuple[int, ...], columns: int) -> dict[str, float]:
    """`sum dy_i @ W_i`."""
    dys = [draw(tokens, width, dtype=torch.bfloat16) for width in widths]
    weights = [draw(width, columns) for width in widths]
    wide = [i for i, width in enumerate(widths) if width >= 1024]
    return _row(
        lambda: matmul.input_gradient(dys, weights),
        lambda: matmul.quantise_rows([dys[i] for i in wide]),
        lambda: matmul.quantise_columns([weights[i] for i in wide]),
    )


def _print(name: str, times: dict[str, float]) -> None:
    gain = times["bf16"] / times["fp8"]
    print(f"{name:<40}" + "".join(f"{times[column]:>11.3f}" for column in COLUMNS) + f"{gain:>8.2f}x")


def main(arguments: list[str]) -> int:
    given = dict(argument.split("=", 1) for argument in arguments)
    tokens = int(given.pop("tokens", 65536))
    if given or not torch.cuda.is_available():
        print("usage, on a machine with a GPU: python -m benchmarks.products [tokens=65536]", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {tokens:,} tokens, milliseconds")
    print(f"{'':<40}" + "".join(f"{column:>11}" for column in COLUMNS) + f"{'gain':>9}")
    for name, shape in OUTPUTS.items():
        _print(f"output: {name}", measure_output(tokens, *shape))
    for name, (widths, columns) in GRADIENTS.items():
        _print(f"gradient: {name}", measure_gradient(tokens, widths, columns))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
