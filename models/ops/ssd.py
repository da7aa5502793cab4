"""State-space duality (SSD), the recurrence of Mamba2 (arXiv 2405.21060, section 6).

Per head, with decay a_t = exp(dt_t A) in (0, 1]:

    h_t = a_t h_{t-1} + dt_t x_t B_t^T        # [P, N]
    y_t = h_t C_t + D x_t                     # [P]

`ssd` works on chunks: inside a chunk as masked attention, between chunks through one state per chunk. Every
decay is the exponential of a sum of log decays over a stretch of tokens, so no exponent is above 0 however
strong it is. `ssd_recurrent` is the definition, token by token: the tests' oracle and the decoder's step.
"""

import importlib.util
import sys
import types
from itertools import pairwise

import torch
from torch import Tensor

from .backend import resolve
from .dtypes import scan_dtype
from .step import one_kernel

# what this repository's kernels take
KERNEL_HEAD_DIMS = (16, 32, 64, 128)
KERNEL_STATE_SIZES = (16, 32, 64, 128, 256, 512)

STEP_STATE_SIZE = 4096  # the decoding kernel holds a channel's whole state at once
CPU_CHUNK = 64  # the chunk's attention matrix then stays in the cache of a core


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 256,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Runs the SSD recurrence over whole sequences, in chunks.

    Args:
        x: inputs `[B, T, H, P]`.
        dt: step sizes `[B, T, H]` after softplus and clamp, fp32 or fp64.
        A: decay rates `[H]`, negative.
        B, C: keys and queries `[B, T, G, N]`; head h uses group `h // (H / G)`.
        D: skip weights `[H]`.
        initial_state: `[S, H, P, N]`, S = B, or the number of sequences when `cu_seqlens` is given.
        cu_seqlens: offsets `[S + 1]` of sequences packed in one row (B == 1): no state crosses an offset.
        chunk_size: tokens a chunk (the Triton kernels choose theirs); it changes results only by rounding.
        backend: see `models/ops/backend.py`; None follows STATEX_BACKEND.

    Returns:
        y `[B, T, H, P]` in x's dtype, and the final state `[S, H, P, N]` in at least fp32 (or None).

    Raises:
        ValueError: shapes that do not fit together, or a backend that cannot run.
    """
    _check_shapes(x, dt, A, B, C, D, initial_state, cu_seqlens)
    options = {"D": D, "initial_state": initial_state, "output_final_state": output_final_state}
    if x.shape[1] == 1 and cu_seqlens is None and backend is None:
        if one_kernel("ssd_step", x, dt, initial_state) and B.shape[3] <= STEP_STATE_SIZE:
            from .step_triton import ssd_step

            y, final = ssd_step(x, dt, A, B, C, D=D, initial_state=initial_state)
            return y, final if output_final_state else None
        return ssd_recurrent(x, dt, A, B, C, **options)
    chosen = resolve("ssd", x.device, _offered(x, B, initial_state, output_final_state, cu_seqlens), backend)
    run = {"torch": _ssd_torch, "mamba_ssm": _ssd_mamba, "triton": _ssd_triton}[chosen]
    return run(x, dt, A, B, C, **options, cu_seqlens=cu_seqlens, chunk_size=chunk_size)


def ssd_packed(
    xBC: Tensor,
    dt: Tensor,
    A: Tensor,
    *,
    groups: int,
    state_size: int,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk_size: int = 256,
    backend: str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`ssd` of x, B and C that lie side by side in one tensor `[B, T, H P + 2 G N]`, as a convolution leaves
    them; the gradient is one tensor as well, and is not put together by copying.

    Raises:
        ValueError: as `ssd`.
    """
    heads, keys = dt.shape[2], groups * state_size
    inner = xBC.shape[-1] - 2 * keys
    if inner <= 0 or inner % heads:
        raise ValueError(
            f"ssd_packed: xBC has {xBC.shape[-1]} channels, expected {heads} heads of x and 2 * {groups} * "
            f"{state_size} of B and C"
        )
    x, B, C = xBC.split([inner, keys, keys], dim=-1)
    x, (B, C) = x.unflatten(-1, (heads, -1)), (t.unflatten(-1, (groups, -1)) for t in (B, C))
    options = {"D": D, "initial_state": initial_state, "output_final_state": output_final_state}
    options["cu_seqlens"] = cu_seqlens
    if x.shape[1] > 1 or backend is not None:
        offered = _offered(x, B, initial_state, output_final_state, cu_seqlens)
        if resolve("ssd", x.device, offered, backend) == "triton":
            from .ssd_triton import ssd_packed_triton

            _check_shapes(x, dt, A, B, C, D, initial_state, cu_seqlens)
            return ssd_packed_triton(xBC, dt, A, groups, state_size, **options)
    return ssd(x, dt, A, B, C, **options, chunk_size=chunk_size, backend=backend)


def ssd_recurrent(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The definition, token by token: same arguments and results as `ssd`."""
    _check_shapes(x, dt, A, B, C, D, initial_state, cu_seqlens)
    if cu_seqlens is not None:
        return _each_sequence(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens)
    dtype = scan_dtype(x, dt)
    heads_per_group = x.shape[2] // B.shape[2]
    with torch.autocast(x.device.type, enabled=False):
        inputs, dt, A = x.to(dtype), dt.to(dtype), A.to(dtype)
        B, C = (t.to(dtype).repeat_interleave(heads_per_group, dim=2) for t in (B, C))  # [B, T, H, N]
        state = _first_state(x, B.shape[-1], initial_state, x.shape[0], dtype)
        decay = torch.exp(dt * A)  # [B, T, H]
        outputs = []
        for t in range(x.shape[1]):
            update = (dt[:, t, :, None] * inputs[:, t]).unsqueeze(-1) * B[:, t].unsqueeze(-2)  # [B, H, P, N]
            state = decay[:, t, :, None, None] * state + update
            outputs.append((state * C[:, t].unsqueeze(-2)).sum(-1))
        y = torch.stack(outputs, dim=1)
        if D is not None:
            y = y + D.to(dtype)[:, None] * inputs
    return y.to(x.dtype), state if output_final_state else None


def sequence_offsets(cu_seqlens: Tensor, length: int) -> list[int]:
    """`cu_seqlens` as checked python integers: from 0 to `length`, never falling."""
    offsets = cu_seqlens.tolist()
    rising = all(a <= b for a, b in pairwise(offsets))
    if len(offsets) < 2 or offsets[0] != 0 or offsets[-1] != length or not rising:
        raise ValueError(
            f"cu_seqlens must rise from 0 to the row's length {length}, got {offsets[:4]} ... {offsets[-1:]}"
        )
    return offsets


def _ssd_torch(x, dt, A, B, C, *, D, initial_state, output_final_state, cu_seqlens, chunk_size):
    length = x.shape[1]
    dtype = scan_dtype(x, dt)
    if x.device.type == "cpu":
        chunk_size = min(chunk_size, CPU_CHUNK)
    chunk_size = min(chunk_size, length)
    with torch.autocast(x.device.type, enabled=False):
        inputs, dt, A, B, C = (t.to(dtype) for t in (x, dt, A, B, C))
        num_sequences = x.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
        state = _first_state(x, B.shape[-1], initial_state, num_sequences, dtype)
        if cu_seqlens is None:
            split = [_pad_to_chunks(t, chunk_size) for t in (inputs, dt, B, C)]
            y, final = _chunked(*split, A, state, None)
            y = y.flatten(1, 2)[:, :length]
        else:
            offsets = sequence_offsets(cu_seqlens, length)
            rows, starts = _chunk_rows(offsets, chunk_size, x.device)
            split = [_gather_chunks(t, rows) for t in (inputs, dt, B, C)]
            y, final = _chunked(*split, A, state, starts)
            y = y.flatten(1, 2)[:, (rows.flatten() < length).nonzero().squeeze(1)]
        if D is not None:
            y = y + D.to(dtype)[:, None] * inputs
    return y.to(x.dtype), final if output_final_state else None


def _chunked(x, dt, B, C, A, state, starts) -> tuple[Tensor, Tensor]:
    """The chunked algorithm on inputs split in chunks `[B, chunks, Q, ...]`; padding has dt = 0.

    `starts`: first chunk of every packed sequence, then the number of chunks; None where rows are sequences.
    """
    batch, chunks, _, heads, head_dim = x.shape
    groups = B.shape[3]
    B, C = B.transpose(2, 3), C.transpose(2, 3)  # [B, c, G, Q, N]
    log_decay = dt * A  # [B, c, Q, H]
    x = x * dt.unsqueeze(-1)

    # inside a chunk: attention weights C_i B_j^T exp(sum of log decays in (j, i])
    between = _segment_sums(log_decay.transpose(2, 3))  # [B, c, H, Q, Q]
    scores = (C @ B.transpose(-1, -2)).unsqueeze(3)  # [B, c, G, 1, Q, Q]
    scores = (scores * between.exp().unflatten(2, (groups, -1))).flatten(2, 3)  # [B, c, H, Q, Q]
    y = (scores @ x.transpose(2, 3)).transpose(2, 3)  # [B, c, Q, H, P]

    # what each chunk adds to the state, all heads of a group in one product
    to_end = between[..., -1, :].transpose(2, 3).exp()  # [B, c, Q, H]
    stacked = _stack_heads(x * to_end.unsqueeze(-1), groups)  # [B, c, G, Q, H/G * P]
    added = (stacked.transpose(-1, -2) @ B).reshape(batch, chunks, heads, head_dim, -1)
    log_decay = log_decay.cumsum(2)
    before, final = _pass_states(added, log_decay[:, :, -1].exp(), state, starts)

    # what each chunk reads from the state in front of it
    before = before.reshape(batch, chunks, groups, -1, B.shape[-1])  # [B, c, G, H/G * P, N]
    read = (C @ before.transpose(-1, -2)).transpose(2, 3).reshape(y.shape)
    return y + read * log_decay.exp().unsqueeze(-1), final


def _segment_sums(log_decay: Tensor) -> Tensor:
    """`[..., Q]` -> `[..., Q, Q]`: at (i, j) the sum over (j, i], minus infinity where j > i.

    Summed as they are and not as differences of running sums, which lose the small steps behind a strong one.
    """
    size = log_decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=log_decay.device)
    steps = log_decay.unsqueeze(-1).expand(*log_decay.shape, size).masked_fill(ones.triu(), 0.0)
    return steps.cumsum(-2).masked_fill(ones.triu(1), float("-inf"))


def _pass_states(
    added: Tensor, decay: Tensor, state: Tensor, starts: list[int] | None
) -> tuple[Tensor, Tensor]:
    """States in front of every chunk `[B, chunks, H, P, N]`, and the final ones `[S, H, P, N]`."""
    added, decay = added.unbind(1), decay[..., None, None].unbind(1)
    if starts is None:
        rows, bounds = [state], [0, len(added)]
    else:
        rows, bounds = list(state.split(1)), starts
    before, final = [], []
    for current, first, last in zip(rows, bounds, bounds[1:]):
        for chunk in range(first, last):
            before.append(current)
            current = decay[chunk] * current + added[chunk]
        final.append(current)
    return torch.stack(before, dim=1), torch.cat(final)


def _stack_heads(x: Tensor, groups: int) -> Tensor:
    """`[B, c, Q, H, P]` -> `[B, c, G, Q, H/G * P]`: the heads of a group side by side."""
    return x.unflatten(3, (groups, -1)).flatten(4).transpose(2, 3)


def _pad_to_chunks(t: Tensor, size: int) -> Tensor:
    missing = -t.shape[1] % size
    if missing:
        t = torch.cat([t, t.new_zeros(t.shape[0], missing, *t.shape[2:])], dim=1)
    return t.unflatten(1, (-1, size))


def _chunk_rows(offsets: list[int], size: int, device: torch.device) -> tuple[Tensor, list[int]]:
    """Token at every place `[chunks, Q]` of chunks that stop at sequence ends (T: none), and their starts."""
    rows, starts = [], [0]
    for first, last in pairwise(offsets):
        tokens = torch.arange(first, first + size * -(-(last - first) // size))
        rows.append(tokens.masked_fill(tokens >= last, offsets[-1]).view(-1, size))
        starts.append(starts[-1] + len(rows[-1]))
    return torch.cat(rows).to(device), starts


def _gather_chunks(t: Tensor, rows: Tensor) -> Tensor:
    padded = torch.cat(
        [t, t.new_zeros(1, 1, *t.shape[2:])], dim=1
    )  # row T: zeros for the places without a token
    return padded[:, rows.flatten()].unflatten(1, tuple(rows.shape))


def _each_sequence(x, dt, A, B, C, D, initial_state, output_final_state, cu_seqlens):
    offsets = sequence_offsets(cu_seqlens, x.shape[1])
    outputs, states = [], []
    for i, (first, last) in enumerate(pairwise(offsets)):
        state = None if initial_state is None else initial_state[i : i + 1]
        if first == last:
            states.append(_first_state(x, B.shape[-1], state, 1, scan_dtype(x, dt)))
            continue
        pieces = [t[:, first:last] for t in (x, dt)] + [A] + [t[:, first:last] for t in (B, C)]
        y, state = ssd_recurrent(*pieces, D=D, initial_state=state, output_final_state=True)
        outputs.append(y)
        states.append(state)
    return torch.cat(outputs, dim=1), torch.cat(states) if output_final_state else None


def _first_state(x: Tensor, state_size: int, initial_state: Tensor | None, sequences: int, dtype) -> Tensor:
    if initial_state is not None:
        return initial_state.to(dtype)
    return torch.zeros(sequences, x.shape[2], x.shape[3], state_size, dtype=dtype, device=x.device)


def _check_shapes(x, dt, A, B, C, D, initial_state, cu_seqlens) -> None:
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    expected = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, state_size)),
        "C": (C, (batch, length, groups, state_size)),
        "D": (D, (heads,)),
        "initial_state": (initial_state, (sequences, heads, head_dim, state_size)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"ssd: {name} has shape {tuple(tensor.shape)}, expected {shape}")
    if heads % groups:
        raise ValueError(
            f"ssd: {heads} heads cannot share {groups} groups of B and C; use a divisor of {heads}"
        )
    if length == 0:
        raise ValueError("ssd: x has no tokens (T = 0)")
    if cu_seqlens is not None and batch != 1:
        raise ValueError(f"ssd: cu_seqlens packs sequences in one row, but x has {batch} rows")


def _offered(x, B, initial_state, output_final_state, cu_seqlens) -> tuple[str, ...]:
    """Implementations that take these inputs, best first."""
    if x.dtype == torch.float64 or x.device.type != "cuda":
        return ("torch",)
    _allow_mamba_ssm_without_selective_scan()
    # packed sequences: mamba_ssm has one state a row, and no gradient for the states of each sequence
    packed_states = cu_seqlens is not None and (initial_state is not None or output_final_state)
    own = x.shape[3] in KERNEL_HEAD_DIMS and B.shape[3] in KERNEL_STATE_SIZES
    return (("triton",) if own else ()) + (() if packed_states else ("mamba_ssm",)) + ("torch",)


def _ssd_triton(x, dt, A, B, C, *, D, initial_state, output_final_state, cu_seqlens, chunk_size):
    from .ssd_triton import ssd_triton

    options = {
        "initial_state": initial_state,
        "output_final_state": output_final_state,
        "cu_seqlens": cu_seqlens,
    }
    return ssd_triton(x, dt, A, B, C, D=D, **options)


def _ssd_mamba(x, dt, A, B, C, *, D, initial_state, output_final_state, cu_seqlens, chunk_size):
    combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    sequence_index = None
    if cu_seqlens is not None:
        offsets = cu_seqlens.to(device=x.device, dtype=torch.int32)
        tokens = torch.arange(x.shape[1], device=x.device, dtype=torch.int32)
        sequence_index = (torch.searchsorted(offsets, tokens, right=True, out_int32=True) - 1).unsqueeze(0)
    result = combined.mamba_chunk_scan_combined(
        x,
        dt.float(),
        A.float(),
        B.to(x.dtype),
        C.to(x.dtype),
        chunk_size,
        D=None if D is None else D.float(),
        initial_states=initial_state,
        seq_idx=sequence_index,
        return_final_states=output_final_state,
    )
    return result if output_final_state else (result, None)


def _allow_mamba_ssm_without_selective_scan() -> None:
    """Lets mamba_ssm import where its compiled Mamba1 extension was not built: its SSD needs only Triton."""
    name = "selective_scan_cuda"
    if name in sys.modules or importlib.util.find_spec("mamba_ssm") is None:
        return
    if importlib.util.find_spec(name) is None:
        sys.modules[name] = _MissingExtension(name)


class _MissingExtension(types.ModuleType):
    """Stands for a compiled extension that is not there; using it says so."""

    def __getattr__(self, attribute: str):
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        raise ImportError(
            f"{self.__name__}.{attribute}: mamba_ssm is installed without its compiled extension"
        )
