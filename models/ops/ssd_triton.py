"""The SSD operator on CUDA with this repository's own Triton kernels: nothing to compile at installation.

Forward: running decays, C B^T once per group and chunk, what every chunk adds to the state, states in front
of the chunks, outputs. Backward: the same states again, their gradients in mirrored order, then dx, the
gradient of C B^T, dB and dC summed over heads inside one program (no atomics: the same bits every time), and
ddt from row sums. States between kernels are in the inputs' dtype, sums and decays in fp32. Only the inputs
are kept for the backward.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .descriptors import row_blocks, token_blocks
from .ssd_triton_backward import (
    key_gradients_kernel,
    pass_gradients_kernel,
    score_gradients_kernel,
    step_gradients_kernel,
)
from .ssd_triton_forward import (
    cumulative_kernel,
    march_kernel,
    outputs_kernel,
    pass_states_kernel,
    scores_kernel,
    state_scale_kernel,
    states_kernel,
)
from .ssd_triton_shape import Shape

try:
    import triton
except ImportError as error:
    raise ImportError("models/ops/ssd_triton.py needs triton") from error

LARGE_STATE = 256  # from here on, products with the state are large enough for a library or a march


def ssd_triton(x, dt, A, B, C, *, D, initial_state, output_final_state, cu_seqlens):
    """`ssd` of `models/ops/ssd.py` on these kernels."""
    options = (D, initial_state, output_final_state, cu_seqlens)
    y, final = _SSD.apply(x, dt, A, B.to(x.dtype), C.to(x.dtype), *options)
    return y, final if output_final_state else None


def ssd_packed_triton(xBC, dt, A, groups, state_size, *, D, initial_state, output_final_state, cu_seqlens):
    """`ssd_packed` of `models/ops/ssd.py` on these kernels."""
    options = (D, initial_state, output_final_state, cu_seqlens)
    y, final = _PackedSSD.apply(xBC, dt, A, groups, state_size, *options)
    return y, final if output_final_state else None


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens):
        return _forward(ctx, x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens)

    @staticmethod
    def backward(ctx, dy, dfinal):
        saved = x, _, _, B, C, _, _ = ctx.saved_tensors
        dx, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, B, C))
        ddt, dA, *others = ssd_backward(ctx.shape, saved, dy, dfinal, dx, dB, dC)
        return dx, ddt, dA, dB, dC, *others, None, None


class _PackedSSD(torch.autograd.Function):
    """x, B and C in one tensor, and their gradients too: what made it reads them without copying."""

    @staticmethod
    def forward(ctx, xBC, dt, A, groups, state_size, D, initial_state, output_final_state, cu_seqlens):
        ctx.sizes = dt.shape[2], groups, state_size
        x, B, C = split_packed(xBC, *ctx.sizes)
        return _forward(ctx, x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens)

    @staticmethod
    def backward(ctx, dy, dfinal):
        saved = x, _, _, B, C, _, _ = ctx.saved_tensors
        width = sum(t[0, 0].numel() for t in (x, B, C))
        dxBC = torch.empty(*x.shape[:2], width, dtype=x.dtype, device=x.device)
        ddt, dA, *others = ssd_backward(ctx.shape, saved, dy, dfinal, *split_packed(dxBC, *ctx.sizes))
        return dxBC, ddt, dA, None, None, *others, None, None


def split_packed(xBC: Tensor, heads: int, groups: int, state_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views x `[B, T, H, P]`, B and C `[B, T, G, N]` of one tensor."""
    keys = groups * state_size
    x, B, C = xBC.split([xBC.shape[-1] - 2 * keys, keys, keys], dim=-1)
    return x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))


def _forward(ctx, x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens):
    inputs = x, dt, A, B, C, D, initial_state = prepared(x, dt, A, B, C, D, initial_state)
    shape = Shape(x, B, cu_seqlens)
    scan, final = start_scan(shape, inputs, output_final_state)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    outputs(shape, x, C, scan.states, scan.scores, D, scan.decays, y, forward=True)
    ctx.save_for_backward(*inputs)
    ctx.shape = shape
    ctx.set_materialize_grads(False)
    return y, final


def prepared(x, dt, A, B, C, D, initial_state) -> tuple[Tensor | None, ...]:
    """The inputs in the dtypes and strides that the kernels read."""
    x, dt, B, C = (_rows(t) for t in (x, dt.float(), B, C))
    A, D = A.float().contiguous(), None if D is None else D.float().contiguous()
    return x, dt, A, B, C, D, None if initial_state is None else initial_state.contiguous()


@dataclass
class Scan:
    """What outputs and gradients are computed from."""

    decays: tuple[Tensor, Tensor]  # see `running_decays`
    scores: Tensor  # [chunks, G, Q, Q]
    states: Tensor | None  # in front of every chunk [chunks, H, P, N]; `ssd_backward` lets go of it


def start_scan(shape: Shape, inputs, output_final_state: bool) -> tuple[Scan, Tensor | None]:
    """All but the outputs, and the final state `[S, H, P, N]` if asked for; `inputs` as from `prepared`."""
    x, dt, A, B, C, _, initial_state = inputs
    decays = running_decays(shape, dt, A)
    scores = chunk_scores(shape, B, C)
    if shape.state_size >= LARGE_STATE:
        states, final, _ = march(shape, x, B, decays, initial_state, output_final_state)
    else:
        states = chunk_states(shape, x, B, decays, forward=True)
        final = pass_states(shape, states, decays, initial_state, output_final_state)
    return Scan(decays, scores, states), final


def ssd_backward(
    shape: Shape, inputs, dy, dfinal, dx: Tensor, dB: Tensor, dC: Tensor, scan: Scan | None = None
) -> tuple[Tensor | None, ...]:
    """Fills dx, dB and dC; returns ddt, dA, dD and the gradient of the initial state.

    Args:
        inputs: as from `prepared`. Read from a context once: a checkpoint lets go of a tensor when
            it is read.
        scan: where a caller has just made it for the outputs; None makes it.
    """
    x, dt, A, B, C, D, initial_state = inputs
    dy = torch.zeros_like(x) if dy is None else _rows(dy)
    dfinal = None if dfinal is None else dfinal.contiguous()
    scan = scan or start_scan(shape, inputs, False)[0]
    decays, scores, states = scan.decays, scan.scores, scan.states
    dscores, row_sums, column_sums, dD = score_gradients(shape, x, dy, scores, decays, D is not None)
    gradients, decay_parts, dinitial = state_gradients(shape, dy, C, states, decays, dfinal, initial_state)
    read_sums = key_gradients(shape, dy, C, B, states, dscores, decays, dC, queries=True)
    scan.states = states = None
    outputs(shape, dy, B, gradients, scores, D, decays, dx, forward=False)
    added_sums = key_gradients(shape, x, B, C, gradients, dscores, decays, dB, queries=False)
    sums = (row_sums, column_sums, read_sums, added_sums)
    ddt, dA = step_gradients(shape, dt, A, decays, sums, decay_parts)
    return ddt, dA, dD, None if dinitial is None else dinitial.to(initial_state.dtype)


def running_decays(shape: Shape, dt: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of log2 decays inside every chunk, and dt, both `[chunks, H, Q]`."""
    cumulative = torch.empty(shape.chunks, shape.heads, shape.chunk, dtype=torch.float32, device=dt.device)
    steps = torch.empty_like(cumulative)
    heads = min(8, triton.next_power_of_2(shape.heads))
    cumulative_kernel[(triton.cdiv(shape.heads, heads), shape.chunks)](
        dt,
        A,
        shape.start,
        shape.lengths,
        cumulative,
        steps,
        dt.stride(1),
        **shape.sizes("H", "Q"),
        HEADS=heads,
    )
    return cumulative, steps


def state_scale(shape: Shape, decays, forward: bool) -> Tensor:
    """What a token's part in the state behind its chunk, or in front of it, is scaled by `[chunks, H, Q]`."""
    scale = torch.empty_like(decays[0])
    state_scale_kernel[(shape.chunks * shape.heads,)](*decays, scale, Q=shape.chunk, FORWARD=forward)
    return scale


def chunk_scores(shape: Shape, B: Tensor, C: Tensor) -> Tensor:
    """C B^T of every chunk `[chunks, G, Q, Q]`; tiles above the diagonal stay unwritten."""
    scores = torch.empty(shape.chunks, shape.groups, shape.chunk, shape.chunk, dtype=B.dtype, device=B.device)
    tiles = shape.tiles("scores")
    grid = ((shape.chunk // tiles["ROWS"]) ** 2, shape.groups, shape.chunks)
    scores_kernel[grid](
        C, B, shape.start, shape.lengths, scores, C.stride(1), B.stride(1),
        **shape.sizes("G", "N", "Q"), **tiles, PRECISION=shape.precision,
    )  # fmt: skip
    return scores


def chunk_states(shape: Shape, values: Tensor, keys: Tensor, decays, *, forward: bool) -> Tensor:
    """What every chunk adds to the state (x and B), or (dy and C) asks of it: `[chunks, H, P, N]`."""
    sizes = shape.chunks, shape.heads, shape.head_dim, shape.state_size
    states = torch.empty(sizes, dtype=shape.state_dtype, device=keys.device)
    tiles = shape.tiles("states")
    grid = (shape.state_size // tiles["BLOCK_N"], shape.heads // tiles["HEADS"], shape.chunks)
    states_kernel[grid](
        values, keys, shape.start, shape.lengths, *decays, states, values.stride(1), keys.stride(1),
        **shape.sizes("H", "G", "P", "N", "Q"), **tiles, FORWARD=forward, PRECISION=shape.precision,
    )  # fmt: skip
    return states


def large_chunk_reads(shape: Shape, keys: Tensor, states: Tensor) -> Tensor:
    """What the keys of every chunk read from its state, without decays, `[T, H P]`: [Q, N] times [N, H P]."""
    reads = torch.empty(
        shape.chunks, shape.chunk, shape.groups, shape.heads // shape.groups * shape.head_dim,
        dtype=states.dtype, device=states.device,
    )  # fmt: skip
    keys = keys.flatten(0, 1).unflatten(0, (shape.chunks, shape.chunk))  # [chunks, Q, G, N]
    states = states.view(shape.chunks, shape.groups, -1, shape.state_size)
    for group in range(shape.groups):
        torch.bmm(keys[:, :, group], states[:, group].transpose(1, 2), out=reads[:, :, group])
    return reads


def march(
    shape: Shape, values: Tensor, keys: Tensor, decays, begin: Tensor | None, last: bool,
    fronts: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """States in front of the chunks from x and B, or gradients of those behind them from dy and C.

    Args:
        begin: the state `[S, H, P, N]` to begin with, that is the initial one or the final one's gradient.
        last: whether what the march ends with, `[S, H, P, N]`, is wanted too.
        fronts: the states in front of the chunks; with them the march goes backwards.

    Returns:
        `[chunks, H, P, N]`, the last one or None, parts of the decays' gradients or None.
    """
    sizes, forward = (shape.heads, shape.head_dim, shape.state_size), fronts is None
    tiles = shape.tiles("march" if forward else "march_back")
    blocks = shape.state_size // tiles["BLOCK_N"]
    states = torch.empty(shape.chunks, *sizes, dtype=shape.state_dtype, device=values.device)
    end = torch.empty(shape.sequences, *sizes, dtype=torch.float32, device=values.device) if last else None
    parts = None
    if not forward:
        parts = decays[0].new_empty(shape.chunks, shape.heads, blocks * shape.head_dim)
    march_kernel[(blocks, shape.heads, shape.sequences)](
        token_blocks(values, tiles["BLOCK_K"], shape.head_dim),
        token_blocks(keys, tiles["BLOCK_K"], tiles["BLOCK_N"]),
        row_blocks(states, shape.head_dim, tiles["BLOCK_N"]),
        row_blocks(state_scale(shape, decays, forward), 1, tiles["BLOCK_K"]),
        fronts, shape.start, shape.lengths, shape.first, decays[0], begin, end, parts,
        **shape.sizes("H", "G", "P", "N", "Q"), **tiles, FORWARD=forward, REGULAR=shape.regular,
        HAS_INITIAL=begin is not None, HAS_FINAL=last, PRECISION=shape.precision,
    )  # fmt: skip
    return states, end, parts


def pass_states(
    shape: Shape, states: Tensor, decays, initial_state: Tensor | None, final: bool
) -> Tensor | None:
    """Makes `states` the states in front of the chunks; the final states `[S, H, P, N]` if asked for."""
    last = None
    if final:
        last = torch.empty(shape.sequences, *states.shape[1:], dtype=torch.float32, device=states.device)
    size, tiles = shape.head_dim * shape.state_size, shape.tiles("pass")
    pass_states_kernel[(size // tiles["BLOCK"], shape.heads, shape.sequences)](
        states, decays[0], shape.first, initial_state, last,
        **shape.sizes("H", "Q"), **tiles, PN=size, HAS_INITIAL=initial_state is not None, HAS_FINAL=final,
    )  # fmt: skip
    return last


def outputs(shape: Shape, values, keys, states, scores, D, decays, out: Tensor, *, forward: bool) -> None:
    """Fills `out` with y from x, C and the states, or with dx from dy, B and their gradients."""
    tiles = shape.tiles("outputs")
    reads = shape.regular and shape.state_size >= LARGE_STATE
    if reads:  # the kernel then takes the product of keys and states as made
        states = large_chunk_reads(shape, keys, states)
    outputs_kernel[(shape.chunk // tiles["ROWS"], shape.heads, shape.chunks)](
        values, keys, states, scores, D, shape.start, shape.lengths, *decays, out,
        values.stride(1), keys.stride(1), out.stride(1),
        **shape.sizes("H", "G", "P", "N", "Q"), **tiles, FORWARD=forward, HAS_D=D is not None,
        HAS_READS=reads, PRECISION=shape.precision,
    )  # fmt: skip


def state_gradients(shape: Shape, dy: Tensor, C: Tensor, states: Tensor, decays, dfinal, initial_state):
    """Gradients of the states behind the chunks; parts of the decays' gradients; the initial state's."""
    if shape.state_size >= LARGE_STATE:
        gradients, dinitial, parts = march(
            shape, dy, C, decays, dfinal, initial_state is not None, fronts=states
        )
    else:
        gradients = chunk_states(shape, dy, C, decays, forward=False)
        parts, dinitial = pass_gradients(shape, gradients, states, decays, dfinal, initial_state)
    return gradients, parts, dinitial


def pass_gradients(shape: Shape, gradients: Tensor, states: Tensor, decays, dfinal, initial_state):
    """Makes `gradients` those of the states behind the chunks; parts of the decays' gradients; dinitial."""
    size, tiles = shape.head_dim * shape.state_size, shape.tiles("pass_gradients")
    blocks = size // tiles["BLOCK"]
    parts = torch.empty(shape.chunks, shape.heads, blocks, dtype=torch.float32, device=states.device)
    dinitial = None if initial_state is None else torch.empty_like(initial_state, dtype=torch.float32)
    pass_gradients_kernel[(blocks, shape.heads, shape.sequences)](
        gradients, states, decays[0], shape.first, dfinal, dinitial, parts,
        **shape.sizes("H", "Q"), **tiles, PN=size, HAS_FINAL=dfinal is not None,
        HAS_INITIAL=dinitial is not None,
    )  # fmt: skip
    return parts, dinitial


def score_gradients(shape: Shape, x: Tensor, dy: Tensor, scores: Tensor, decays, has_D: bool):
    """Gradient of the scores (over all heads of a group), row and column sums of every head, and dD."""
    tiles = shape.tiles("score_gradients")
    rows = tiles["ROWS"]
    count = shape.chunk // rows
    dscores = torch.empty_like(scores)
    row_sums = torch.empty(
        shape.chunks, shape.heads, count, shape.chunk, dtype=torch.float32, device=x.device
    )
    column_sums = torch.empty_like(row_sums)
    new = torch.empty if shape.regular else torch.zeros  # chunks without tokens write nothing
    dD = new(shape.chunks, shape.heads, shape.chunk, dtype=torch.float32, device=x.device) if has_D else None
    operands = [token_blocks(t, rows, shape.head_dim) for t in (x, dy)]
    operands += [row_blocks(t, rows, rows) for t in (scores, dscores)]
    for diagonal, programs in ((True, count), (False, count**2)):
        if diagonal or count > 1:
            score_gradients_kernel[(programs, shape.groups, shape.chunks)](
                *operands, shape.start, shape.lengths, *decays, row_sums, column_sums, dD,
                **shape.sizes("H", "G", "P", "Q"), **tiles, DIAGONAL=diagonal, REGULAR=shape.regular,
                HAS_D=has_D, PRECISION=shape.precision,
            )  # fmt: skip
    return dscores, row_sums, column_sums, dD.sum((0, 2)) if has_D else None


def key_gradients(shape: Shape, values, keys, others, states, dscores, decays, out, *, queries: bool):
    """Fills `out` with dC (queries) or dB; what each token reads or adds `[blocks of N, chunks, H, Q]`."""
    tiles = shape.tiles("key_gradients")
    blocks = shape.state_size // tiles["BLOCK_N"]
    sums = torch.empty(
        blocks, shape.chunks, shape.heads, shape.chunk, dtype=torch.float32, device=keys.device
    )
    key_gradients_kernel[(shape.chunk // tiles["ROWS"], blocks, shape.chunks * shape.groups)](
        values, keys, others, states, dscores, shape.start, shape.lengths, *decays, out, sums,
        values.stride(1), keys.stride(1), others.stride(1), out.stride(1),
        **shape.sizes("H", "G", "P", "N", "Q"), **tiles, QUERIES=queries, PRECISION=shape.precision,
    )  # fmt: skip
    return sums


def step_gradients(shape: Shape, dt: Tensor, A: Tensor, decays, sums, decay_parts) -> tuple[Tensor, Tensor]:
    """ddt `[B, T, H]` and dA `[H]` from the sums of the other kernels."""
    row_sums, _, read_sums, _ = sums
    tiles = shape.tiles("steps")
    ddt = torch.empty(dt.shape, dtype=torch.float32, device=dt.device)
    dA = torch.empty(shape.chunks, shape.heads, dtype=torch.float32, device=dt.device)
    step_gradients_kernel[(triton.cdiv(shape.heads, tiles["HEADS"]), shape.chunks)](
        A, shape.start, shape.lengths, decays[1], *sums, decay_parts, ddt, dA,
        **shape.sizes("H", "Q"), **tiles, TILES=row_sums.shape[2], N_BLOCKS=read_sums.shape[0],
        DECAY_BLOCKS=decay_parts.shape[2],
    )  # fmt: skip
    return ddt, dA.sum(0)


def _rows(t: Tensor) -> Tensor:
    """The tensor itself where a constant stride leads from token to token through all rows, else a copy."""
    inner = t.shape[2:]
    packed = torch.empty(0).new_empty(inner, device="meta").stride()
    if t.stride()[2:] == packed and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1)):
        return t
    return t.contiguous()
