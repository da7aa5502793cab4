"""Gated linear attention: a linear RNN whose state [K, V] decays per key channel.

    S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t        o_t = scale * q_t S_t

(Yang et al. 2023, arXiv 2312.06635, equation 3.) `gla_recurrent` is this definition step by step; `gla`
computes the same in chunks, with plain torch or with Triton kernels. Shapes: B batch, T tokens, H heads,
K key channels, V value channels, N states (sequences), C tokens of a chunk.
"""

import importlib
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import resolve
from .dtypes import product_dtype, scan_dtype
from .step import one_kernel

CHUNK_SIZE = 64
PAIRWISE_SIZE = 4  # blocks up to this size compare every query with every key; larger ones are halved
SHORT_LENGTH = 32  # up to here a step-by-step kernel beats fla's chunked one


def gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Gated linear attention over whole sequences, in chunks.

    Args:
        q, k: queries and keys [B, T, H, K].
        v: values [B, T, H, V].
        g: log decay of each key channel at each token, <= 0, [B, T, H, K].
        scale: factor on the output, usually K ** -0.5.
        initial_state: [N, H, K, V], the state before the first token; None is zero.
        output_final_state: return the state after the last token too.
        cu_seqlens: integer [N + 1], boundaries of N sequences laid end to end in a batch of one; None: N = B.
        backend: torch | triton | fla; None chooses by device, shape and STATEX_BACKEND.
        keep: where a kernel could recompute its intermediate results in the backward pass, keep them: for
            layers that are themselves recomputed just before their backward pass.

    Returns:
        o [B, T, H, V] in v's dtype and the final state [N, H, K, V] in at least float32 (None unasked).

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run here.
    """
    _check_shapes(q, k, v, g, initial_state, cu_seqlens)
    chosen = resolve("gla", q.device, _offered(q, v), backend)
    arguments = (q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)
    if q.shape[1] == 1 and cu_seqlens is None and chosen == "torch":  # a decoding step
        return _recurrent(*arguments)
    if chosen == "triton":
        return _triton(*arguments, gate=None, gate_map=None, keep=keep)
    return _fla(*arguments) if chosen == "fla" else _chunked(*arguments)


def gla_gated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    gate_map: tuple[Tensor, Tensor] | None = None,
    gate_logit_normalizer: float = 16.0,
    clamp_min: float | None = None,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`gla` from the gate's logits: g = logsigmoid(logits) / gate_logit_normalizer, >= clamp_min.

    The kernels of this repository do this on the way in, so that g never exists in memory. The rest is `gla`.

    Args:
        gate: the logits [B, T, H, K]; with a gate_map what they are made from, [B, T, R].
        gate_map: weight [H * K, R] and bias [H * K] of the linear map from gate to the logits. The kernels'
            path keeps `gate` alone for the backward pass, R numbers a token, and makes the logits again.
    """
    _check_shapes(q, k, v, q if gate_map else gate, initial_state, cu_seqlens)
    step = cu_seqlens is None and backend is None and one_kernel("gla_step", q, k, v, gate, initial_state)
    if not step and resolve("gla", q.device, _offered(q, v), backend) == "triton":
        arguments = (q, k, v, gate, scale, initial_state, output_final_state, cu_seqlens)
        decay = (gate_logit_normalizer, clamp_min)
        return _triton(*arguments, gate=decay, gate_map=gate_map, keep=keep)
    if gate_map is not None:
        dtype = product_dtype(gate)
        gate = F.linear(*(x.to(dtype) for x in (gate, *gate_map))).view(q.shape)
    if step:
        from .step_triton import gla_step

        decay = {"gate_logit_normalizer": gate_logit_normalizer, "clamp_min": clamp_min}
        o, final = gla_step(q, k, v, gate, **decay, scale=scale, initial_state=initial_state)
        return o, final if output_final_state else None
    g = log_decay(gate, gate_logit_normalizer, clamp_min)
    options = {"scale": scale, "initial_state": initial_state, "output_final_state": output_final_state}
    return gla(q, k, v, g, cu_seqlens=cu_seqlens, backend=backend, **options)


def made_again(o: Tensor, wanted: bool = True) -> AbstractContextManager:
    """While this is entered, an output `o` of `gla` or `gla_gated` can be used without being kept.

    An operation saves its input for its backward pass. Where that input is `o` itself, of this repository's
    kernels, it is made again instead, at the price of one kernel: the scan's backward pass needs all the rest
    anyway. Other implementations' outputs are kept, and so is `o` when this is not `wanted`. Not within a
    checkpointed region, which keeps nothing itself.
    """
    if not (wanted and getattr(o.grad_fn, "remakes_output", False)):
        return nullcontext()
    from .gla_triton import output_made_again

    return output_made_again(o)


def log_decay(gate: Tensor, normalizer: float, clamp_min: float | None = None) -> Tensor:
    """Log decay of a gate's logits, in at least float32."""
    g = F.logsigmoid(gate.to(scan_dtype(gate))) / normalizer
    return g if clamp_min is None else g.clamp_min(clamp_min)


def gla_recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`gla` by its definition, one token after the other: the oracle of the tests and a decoder's step.

    Arguments and results are those of `gla`; `backend` has no choice to make and is there for symmetry.
    """
    del backend
    _check_shapes(q, k, v, g, initial_state, cu_seqlens)
    return _recurrent(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens)


# --------------------------------------------------------------------------------------------- step by step


def _recurrent(
    q, k, v, g, scale, initial_state, output_final_state, cu_seqlens
) -> tuple[Tensor, Tensor | None]:
    state = _first_state(q, k, v, g, initial_state, cu_seqlens)
    if cu_seqlens is None:
        o, state = _steps(q, k, v, g, scale, state)
        return o.to(v.dtype), state if output_final_state else None
    bounds = cu_seqlens.tolist()
    outputs, states = [], []
    for n, (start, end) in enumerate(pairwise(bounds)):
        piece = (x[:, start:end] for x in (q, k, v, g))
        o, last = _steps(*piece, scale, state[n : n + 1])
        outputs.append(o)
        states.append(last)
    final_state = torch.cat(states) if output_final_state else None
    return torch.cat(outputs, dim=1).to(v.dtype), final_state


def _steps(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, state: Tensor) -> tuple[Tensor, Tensor]:
    q, k, v, decay = q.to(state) * scale, k.to(state), v.to(state), g.to(state).exp()
    outputs = []
    for t in range(q.shape[1]):
        state = decay[:, t, :, :, None] * state + k[:, t, :, :, None] * v[:, t, :, None, :]  # [N, H, K, V]
        outputs.append((q[:, t, :, None, :] @ state).squeeze(-2))  # [N, H, V]
    return torch.stack(outputs, dim=1) if outputs else v, state


# ------------------------------------------------------------------------------------------------ in chunks


def _chunked(
    q, k, v, g, scale, initial_state, output_final_state, cu_seqlens
) -> tuple[Tensor, Tensor | None]:
    state = _first_state(q, k, v, g, initial_state, cu_seqlens)
    layout = _ChunkLayout(q.shape[1], None if cu_seqlens is None else cu_seqlens.tolist())
    out_dtype = v.dtype
    q, k, v, g = (layout.split(x.to(state)) for x in (q, k, v, g))  # [B, H, chunks, C, K or V]

    updates = (k * _after(g).exp()).transpose(-1, -2) @ v  # [B, H, chunks, K, V], each chunk on its own
    states, final_state = layout.scan(g.sum(-2)[..., None].exp(), updates, state)
    o = (q * g.cumsum(-2).exp()) @ states + decayed_scores(q, k, g) @ v
    return layout.join(o * scale).to(out_dtype), final_state if output_final_state else None


def decayed_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    """Causal scores [..., C, C]: sum over K of q_i k_j exp(g_{j+1} + ... + g_i) for j <= i, else 0.

    Factoring the decay into q exp(b) and k exp(-b), b the running sum of g, overflows under strong gates. A
    block is halved instead: the later half's queries meet the earlier half's keys in a matrix product, both
    decayed to the boundary between the halves. Each exponent is a sum of g itself, never a difference of
    running sums: it is never above 0 and its gradient does not cancel.
    """
    size = q.shape[-2]
    if size <= PAIRWISE_SIZE:
        return _pairwise_scores(q, k, g)
    half = size // 2
    (_, q2), (k1, _), (g1, g2) = (x.split(half, dim=-2) for x in (q, k, g))
    across = (q2 * g2.cumsum(-2).exp()) @ (k1 * _after(g1).exp()).transpose(-1, -2)
    within = decayed_scores(*(x.unflatten(-2, (2, half)) for x in (q, k, g)))  # [..., 2, half, half]
    upper = torch.cat([within[..., 0, :, :], torch.zeros_like(across)], dim=-1)
    lower = torch.cat([across, within[..., 1, :, :]], dim=-1)
    return torch.cat([upper, lower], dim=-2)


def _pairwise_scores(q: Tensor, k: Tensor, g: Tensor) -> Tensor:
    size = q.shape[-2]
    past = torch.ones(size, size, dtype=torch.bool, device=q.device).tril(-1)[..., None]
    decay = torch.where(past, g[..., :, None, :], 0.0).cumsum(-3).exp()  # [..., C, C, K]
    return (q[..., :, None, :] * k[..., None, :, :] * decay).sum(-1).tril()


def _after(g: Tensor) -> Tensor:
    """Sum of g [..., C, K] over the tokens behind each token: a key's log decay until the block ends."""
    shifted = F.pad(g[..., 1:, :], (0, 0, 0, 1))
    return shifted.flip(-2).cumsum(-2).flip(-2)


class _ChunkLayout:
    """Where each token sits when every sequence is cut into whole chunks, the last one filled with zeros."""

    def __init__(self, length: int, bounds: list[int] | None) -> None:
        lengths = [length] if bounds is None else [end - start for start, end in pairwise(bounds)]
        longest = max([PAIRWISE_SIZE, *lengths])
        self.size = min(CHUNK_SIZE, 1 << (longest - 1).bit_length())
        self.lengths = lengths
        self.chunks = [-(-n // self.size) for n in lengths]  # of each sequence
        self.shares_batch = bounds is None

    def split(self, x: Tensor) -> Tensor:
        """[B, T, H, D] -> [B, H, chunks, C, D]"""
        pieces = x.split(self.lengths, dim=1)
        padded = [
            F.pad(piece, (0, 0, 0, 0, 0, chunks * self.size - piece.shape[1]))
            for piece, chunks in zip(pieces, self.chunks)
        ]
        x = padded[0] if len(padded) == 1 else torch.cat(padded, dim=1)
        return x.transpose(1, 2).unflatten(2, (-1, self.size)).contiguous()

    def join(self, x: Tensor) -> Tensor:
        """[B, H, chunks, C, D] -> [B, T, H, D]"""
        pieces = x.flatten(2, 3).transpose(1, 2).split([chunks * self.size for chunks in self.chunks], dim=1)
        return torch.cat([piece[:, :length] for piece, length in zip(pieces, self.lengths)], dim=1)

    def scan(self, decays: Tensor, updates: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """States in front of every chunk [B, H, chunks, K, V] and behind every sequence [N, H, K, V]."""
        steps = iter(zip(decays.unbind(2), updates.unbind(2)))
        before, after = [], []
        for current, chunks in zip([state] if self.shares_batch else state.split(1), self.chunks):
            for _, (decay, update) in zip(range(chunks), steps):
                before.append(current)
                current = decay * current + update
            after.append(current)
        return torch.stack(before, dim=2), torch.cat(after)


# -------------------------------------------------------------------------------------------------- kernels


def _triton(
    q, k, v, g, scale, initial_state, output_final_state, cu_seqlens, *, gate, gate_map, keep
) -> tuple[Tensor, Tensor | None]:
    from .gla_triton import gla_triton

    options = {"scale": scale, "initial_state": initial_state, "output_final_state": output_final_state}
    q, k = q.to(v.dtype), k.to(v.dtype)
    return gla_triton(q, k, v, g, cu_seqlens=cu_seqlens, gate=gate, gate_map=gate_map, keep=keep, **options)


def _fla(q, k, v, g, scale, initial_state, output_final_state, cu_seqlens) -> tuple[Tensor, Tensor | None]:
    operators = importlib.import_module("fla.ops.gla")
    options = {"scale": scale, "initial_state": initial_state, "output_final_state": output_final_state}
    q, k = q.to(v.dtype), k.to(v.dtype)
    if q.shape[1] <= SHORT_LENGTH:
        return operators.fused_recurrent_gla(q, k, v, gk=g, cu_seqlens=cu_seqlens, **options)
    return operators.chunk_gla(q, k, v, g, cu_seqlens=cu_seqlens, **options)


def _offered(q: Tensor, v: Tensor) -> tuple[str, ...]:
    """Implementations for this input, best first."""
    T, K = q.shape[1], q.shape[3]
    if torch.float64 in (v.dtype, q.dtype) or T == 0:
        return ("torch",)
    if T == 1:  # a decoding step: the definition is as good as a kernel
        return ("torch", "fla")
    # K and V that tile without a remainder: models/ops/gla_triton.py
    whole = all(16 <= size <= 4096 and size & (size - 1) == 0 for size in (K, v.shape[-1]))
    return ("triton", "fla", "torch") if whole else ("fla", "torch")


# --------------------------------------------------------------------------------------------------- shapes


def _first_state(q, k, v, g, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    dtype = scan_dtype(q, k, v, g, initial_state)
    if initial_state is not None:
        return initial_state.to(dtype)
    return q.new_zeros(_state_shape(q, v, cu_seqlens), dtype=dtype)


def _state_shape(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, int, int]:
    sequences = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return sequences, q.shape[2], q.shape[3], v.shape[3]


def _check_shapes(q, k, v, g, initial_state: Tensor | None, cu_seqlens: Tensor | None) -> None:
    if q.ndim != 4 or k.shape != q.shape or g.shape != q.shape or v.shape[:-1] != q.shape[:-1]:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in zip("qkgv", (q, k, g, v)))
        raise ValueError(f"gla wants q, k, g of one shape [B, T, H, K] and v [B, T, H, V]; got {shapes}")
    if cu_seqlens is not None and q.shape[0] != 1:
        raise ValueError(
            f"gla with cu_seqlens wants its sequences end to end in a batch of one; got {q.shape[0]} rows"
        )
    if initial_state is not None and initial_state.shape != _state_shape(q, v, cu_seqlens):
        raise ValueError(
            f"gla's initial_state must be [N, H, K, V] = {_state_shape(q, v, cu_seqlens)}; "
            f"got {tuple(initial_state.shape)}"
        )
