"""Chunked gated linear attention with this repository's Triton kernels: one autograd function around them.

It keeps its inputs alone. What the kernels make on the way (`Inner`) is made again in the backward pass, and
so can be the output, for whoever needs it there (`output_made_again`), and the gate's logits.

What differs from chunks of 64 tokens everywhere (arXiv 2312.06635): states are stored once per 128 or 256
tokens and recomputed in the backward pass, so that a state of K = 1024 by V = 2048 costs about 1 GB at 65,536
tokens instead of several; decays are multiplied into the operands once, which leaves plain matrix products
for everything of size K x V.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .descriptors import row_blocks, token_blocks
from .gla_chunks import ChunkLayout, chunk_layout
from .gla_triton_intra import intra_backward_kernel, prepare_kernel, scores_kernel
from .gla_triton_mild import mild_backward_kernel, mild_scores_kernel
from .gla_triton_settings import settings_for
from .gla_triton_state import dscores_kernel, grad_kernel, march_kernel, mix_kernel
from .matmul import bias_gradient, weight_gradient


def gla_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    gate: tuple[float, float | None] | None = None,
    gate_map: tuple[Tensor, Tensor] | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`gla` for q, k [B, T, H, K] and v [B, T, H, V] of one 16- or 32-bit type, K and V powers of two >= 16.

    Args:
        gate: (normalizer, lower bound or None): g then holds gate logits, and the log decay is
            max(logsigmoid(g) / normalizer, lower bound).
        gate_map: weight [H * K, R] and bias [H * K]: g is then [B, T, R], what they make the logits from.
        keep: keep decayed operands and states for the backward pass instead of recomputing them: faster by a
            quarter of the backward pass; for layers that are recomputed as a whole.
    """
    settings = settings_for(q, v)
    layout = chunk_layout(q.shape[0], q.shape[1], cu_seqlens, settings["chunk"]["size"], q.device)
    q, k, v, g = (x.contiguous() for x in (q, k, v, g))
    options = Options(scale, gate, output_final_state, keep)
    weight, bias = gate_map or (None, None)
    return _ChunkedGLA.apply(q, k, v, g, weight, bias, initial_state, layout, options, settings)


@dataclass(frozen=True)
class Options:
    scale: float
    gate: tuple[float, float | None] | None  # (normalizer, lower bound) when g holds logits
    output_final_state: bool
    keep: bool


# ------------------------------------------------------------------------------------------------- launches


class Inner(NamedTuple):
    """What the kernels make between the inputs and the output."""

    queries: Tensor  # q and k [B, T, H, K], decayed from the start of their chunk and to its end
    keys: Tensor
    b: Tensor  # log decays [B, T, H, K], float32
    total: Tensor  # [chunks, H, K], float32
    scores: Tensor  # within a chunk, [B, T, H, C]
    states: Tensor  # in front of each chunk, [chunks, H, K, V]


class Launcher:
    """The kernels at one shape, one method each: allocates what a kernel writes and launches it."""

    def __init__(self, q: Tensor, v: Tensor, layout: ChunkLayout, options: Options, settings: dict) -> None:
        self.H, self.K, self.V = q.shape[2], q.shape[3], v.shape[3]
        self.layout, self.options, self.settings, self.like = layout, options, settings, q
        # three tf32 products make one of nearly float32 precision; 16-bit operands ignore it
        self.precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
        normalizer, lower = options.gate or (1.0, None)
        self.gate = (1.0 / normalizer, 0.0 if lower is None else lower)
        self.gate_flags = {"GATED": options.gate is not None, "CLAMP": lower is not None}

    def inner(
        self, q: Tensor, k: Tensor, v: Tensor, g: Tensor, first: Tensor | None, store_last: bool
    ) -> tuple[Inner, Tensor | None]:
        """All that comes before the output, and the last state where wanted."""
        queries, keys, b, total = self.prepare(q, k, g)
        scores = self.scores(q, k, b, queries, keys, total)
        states, last = self.march(keys, v, total, first, store_last, reverse=False)
        return Inner(queries, keys, b, total, scores, states), last

    def prepare(self, q: Tensor, k: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """queries, keys, b [B, T, H, K] and the chunks' totals [chunks, H, K]."""
        settings, layout = self.settings["prepare"], self.layout
        queries, keys = torch.empty_like(q), torch.empty_like(k)
        b = torch.empty_like(q, dtype=torch.float32)
        total = b.new_empty(layout.num_chunks, self.H, self.K)
        grid = (self.K // settings["BK"], layout.num_chunks, self.H)
        prepare_kernel[grid](
            q, k, g, queries, keys, b, total, layout.chunks, self.options.scale, *self.gate,
            H=self.H, K=self.K, C=layout.size, **self.gate_flags, **settings,
        )  # fmt: skip
        return queries, keys, b, total

    def scores(self, q: Tensor, k: Tensor, b: Tensor, queries: Tensor, keys: Tensor, total: Tensor) -> Tensor:
        """Two kernels, each for its share of the chunks: those that decay mildly, and the others."""
        settings, layout = self.settings["scores"], self.layout
        scores = q.new_empty(*q.shape[:3], layout.size)
        shape = {"H": self.H, "K": self.K, "C": layout.size, "PRECISION": self.precision}
        tiles = layout.size // settings["BM"]
        mild_scores_kernel[tiles, layout.num_chunks * tiles, self.H](
            queries, keys, total, scores, layout.chunks, **shape, **settings
        )
        blocks = layout.size // 64
        scores_kernel[blocks, layout.num_chunks * blocks, self.H](
            q, k, b, total, scores, layout.chunks, self.options.scale, **shape,
            **self.settings["strong_scores"],
        )  # fmt: skip
        return scores

    def march(
        self, x: Tensor, y: Tensor, total: Tensor, first: Tensor | None, store_last: bool, reverse: bool
    ) -> tuple[Tensor, Tensor | None]:
        """States in front of each chunk [chunks, H, K, V], and the last one [N, H, K, V] in float32."""
        settings, layout = self.settings["march"], self.layout
        states = x.new_empty(layout.num_chunks, self.H, self.K, self.V)
        shape = (layout.num_sequences, self.H, self.K, self.V)
        last = x.new_empty(shape, dtype=torch.float32) if store_last else None
        grid = (self.V // settings["BV"], self.K // settings["BK"], layout.num_sequences * self.H)
        BK, BV, BT = (settings[size] for size in ("BK", "BV", "BT"))
        tables = x, y, states
        if settings["BLOCKS"]:
            tables = token_blocks(x, BT, BK), token_blocks(y, BT, BV), row_blocks(states, BK, BV)
        march_kernel[grid](
            *tables, total, first, last, layout.bounds, layout.chunk_bounds,
            H=self.H, K=self.K, V=self.V, C=layout.size, REVERSE=reverse,
            REGULAR=layout.regular or not settings["BLOCKS"],  # pointers are masked in any case
            HAS_FIRST=first is not None, STORE_LAST=store_last, PRECISION=self.precision, **settings,
        )  # fmt: skip
        return states, last

    def mix(self, x: Tensor, states: Tensor, scores: Tensor, y: Tensor, transposed: bool) -> Tensor:
        settings, layout = self.settings["mix"], self.layout
        out = torch.empty_like(y)
        grid = (self.V // settings["BV"], layout.num_chunks * (layout.size // settings["BM"]), self.H)
        mix_kernel[grid](
            x, states, scores, y, out, layout.chunks,
            H=self.H, K=self.K, V=self.V, C=layout.size, TRANSPOSED=transposed, PRECISION=self.precision,
            **settings,
        )  # fmt: skip
        return out

    def grad(self, do: Tensor, v: Tensor, states: Tensor, dstates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the decayed queries and keys in the type of q and k, whose rounding outweighs theirs;
        the sum over V of states * dstates in float32."""
        settings, layout = self.settings["grad"], self.layout
        dqueries, dkeys = torch.empty_like(self.like), torch.empty_like(self.like)
        product = do.new_empty(layout.num_chunks, self.H, self.K, dtype=torch.float32)
        grid = (self.K // settings["BK"], layout.num_chunks * (layout.size // settings["BM"]), self.H)
        BM, BK, BV = (settings[size] for size in ("BM", "BK", "BV"))
        tables = do, v, states, dstates
        if settings["BLOCKS"]:
            tables = *(token_blocks(t, BM, BV) for t in (do, v)), *(row_blocks(t, BK, BV) for t in tables[2:])
        grad_kernel[grid](
            *tables, states, dstates, dqueries, dkeys, product, layout.chunks,
            H=self.H, K=self.K, V=self.V, C=layout.size, PRECISION=self.precision, **settings,
        )  # fmt: skip
        return dqueries, dkeys, product

    def dscores(self, do: Tensor, v: Tensor) -> Tensor:
        settings, layout = self.settings["dscores"], self.layout
        dscores = do.new_empty(*do.shape[:3], layout.size)
        tiles = layout.size // settings["BM"]
        dscores_kernel[tiles, layout.num_chunks * tiles, self.H](
            do, v, dscores, layout.chunks, self.options.scale,
            H=self.H, V=self.V, C=layout.size, PRECISION=self.precision, **settings,
        )  # fmt: skip
        return dscores

    def intra_backward(
        self, q, k, g, b, total, dscores, dqueries, dkeys, product
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dq, dk and the gradient of g (of its logits when gated); two kernels, as for the scores."""
        dq, dk, dg = torch.empty_like(q), torch.empty_like(k), torch.empty_like(g)
        for kernel, name in (
            (mild_backward_kernel, "intra_backward"),
            (intra_backward_kernel, "strong_intra_backward"),
        ):
            settings = self.settings[name]
            columns = settings["BK"] * settings.get("TILES", 1)  # of a program
            kernel[self.K // columns, self.layout.num_chunks, self.H](
                q, k, g, b, total, dscores, dqueries, dkeys, product, dq, dk, dg, self.layout.chunks,
                self.options.scale, *self.gate, H=self.H, K=self.K, C=self.layout.size,
                PRECISION=self.precision, **self.gate_flags, **settings,
            )  # fmt: skip
        return dq, dk, dg


class _ChunkedGLA(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, gate_weight, gate_bias, initial_state, layout, options, settings):
        launch = Launcher(q, v, layout, options, settings)
        first = None if initial_state is None else initial_state.contiguous()
        with _device_of(q):
            gate = _gate(g, gate_weight, gate_bias, q)
            inner, last = launch.inner(q, k, v, gate, first, options.output_final_state)
            o = launch.mix(inner.queries, inner.states, inner.scores, v, transposed=False)
        ctx.save_for_backward(q, k, v, g, gate_weight, gate_bias, first, *(inner if options.keep else ()))
        ctx.layout, ctx.options, ctx.settings = layout, options, settings
        ctx.state_dtype = None if initial_state is None else initial_state.dtype
        ctx.remakes_output, ctx.again = True, None
        return o, last

    @staticmethod
    def backward(ctx, do, dlast):
        again, ctx.again = ctx.again or _run_again(ctx), None
        launch, (q, k, v, g, gate_weight, gate_bias), gate, (queries, keys, b, total, scores, states) = again
        del again
        do = do.contiguous()
        with _device_of(q):
            dlast = None if dlast is None else dlast.contiguous()
            wants_first = ctx.needs_input_grad[6]
            dstates, dfirst = launch.march(queries, do, total, dlast, wants_first, reverse=True)
            dv = launch.mix(keys, dstates, scores, do, transposed=True)
            del scores, queries, keys
            dqueries, dkeys, product = launch.grad(do, v, states, dstates)
            del states, dstates
            dscores = launch.dscores(do, v)
            dq, dk, dg = launch.intra_backward(q, k, gate, b, total, dscores, dqueries, dkeys, product)
            dg, dweight, dbias = _gate_gradients(dg, g, gate_weight, gate_bias)
        dfirst = dfirst.to(ctx.state_dtype) if wants_first else None
        return dq, dk, dv, dg, dweight, dbias, dfirst, None, None, None


def _run_again(node) -> tuple["Launcher", tuple, Tensor, Inner]:
    """What a scan's backward pass starts from. Reads the saved tensors, which a checkpoint hands out once."""
    q, k, v, g, gate_weight, gate_bias, first, *kept = node.saved_tensors
    launch = Launcher(q, v, node.layout, node.options, node.settings)
    with _device_of(q):
        gate = _gate(g, gate_weight, gate_bias, q)
        inner = Inner(*kept) if kept else launch.inner(q, k, v, gate, first, store_last=False)[0]
    return launch, (q, k, v, g, gate_weight, gate_bias), gate, inner


@contextmanager
def output_made_again(o: Tensor) -> Iterator[None]:
    """What runs inside saves the output `o` of a scan for its backward pass without keeping it.

    The scan's own backward pass, which comes next, makes everything again that `o` takes but for one kernel:
    `o` is made then, and what the scan needs is left with it. Not for checkpointed regions: saved tensors go
    past the checkpoint here.
    """
    node, place, size = o.grad_fn, o.data_ptr(), o.numel()

    def pack(x: Tensor) -> Tensor | torch.Size:
        return x.shape if (x.data_ptr(), x.numel()) == (place, size) else x

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        node.again = node.again or _run_again(node)
        launch, (_, _, v, *_), _, inner = node.again
        with _device_of(v):
            o = launch.mix(inner.queries, inner.states, inner.scores, v, transposed=False)
        return o.view(packed)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _gate(g: Tensor, weight: Tensor | None, bias: Tensor | None, q: Tensor) -> Tensor:
    """g as the kernels read it, [B, T, H, K]: as given, or logits made from g [B, T, R] in q's dtype."""
    if weight is None:
        return g
    return F.linear(g.to(q.dtype), weight.to(q.dtype), bias.to(q.dtype)).view(q.shape)


def _gate_gradients(
    dgate: Tensor, g: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of g, weight and bias from that of what `_gate` returns."""
    if weight is None:
        return dgate, None, None
    dgate, rows = dgate.view(-1, len(weight)), g.view(-1, g.shape[-1]).to(dgate.dtype)
    dg = (dgate @ weight.to(dgate.dtype)).view(g.shape).to(g.dtype)
    return dg, weight_gradient(dgate, rows, weight), bias_gradient(dgate, bias)


def _device_of(x: Tensor):
    # Triton launches on the current device, which need not be the tensors' one
    return torch.cuda.device(x.device) if x.is_cuda else _Nothing()


class _Nothing:
    def __enter__(self) -> None: ...

    def __exit__(self, *_) -> None: ...
