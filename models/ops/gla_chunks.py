"""Where the chunks of GLA's Triton kernels begin and end: small tables on the device, remembered."""

import weakref
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class ChunkLayout:
    """Chunks of at most `size` tokens, none across two sequences, over all tokens laid end to end."""

    size: int
    num_sequences: int
    num_chunks: int
    regular: bool  # every chunk has `size` tokens
    chunks: Tensor  # [chunks, 2]: first token, end of its sequence
    bounds: Tensor  # [N + 1]: first token of each sequence
    chunk_bounds: Tensor  # [N + 1]: first chunk of each sequence


def chunk_layout(B: int, T: int, cu_seqlens: Tensor | None, size: int, device: torch.device) -> ChunkLayout:
    """The layout of a batch, remembered: building it copies to the device and reads cu_seqlens."""
    if cu_seqlens is None:
        return _dense_layout(B, T, size, device)
    if cu_seqlens.is_inference():  # it keeps no version by which a change in place would show
        return _build_layout(cu_seqlens.tolist(), size, device)
    for reference, version, known, layout in _recent:
        if reference() is cu_seqlens and version == cu_seqlens._version and known == size:
            return layout
    layout = _build_layout(cu_seqlens.tolist(), size, device)
    _recent.insert(0, (weakref.ref(cu_seqlens), cu_seqlens._version, size, layout))
    del _recent[8:]
    return layout


_recent: list[tuple[weakref.ref, int, int, ChunkLayout]] = []


@lru_cache(maxsize=32)
def _dense_layout(B: int, T: int, size: int, device: torch.device) -> ChunkLayout:
    return _build_layout([n * T for n in range(B + 1)], size, device)


def _build_layout(bounds: list[int], size: int, device: torch.device) -> ChunkLayout:
    chunks = [(token, end) for start, end in pairwise(bounds) for token in range(start, end, size)]
    counts = [-(-(end - start) // size) for start, end in pairwise(bounds)]
    tables = (torch.tensor(x, dtype=torch.int32) for x in (chunks, bounds, [0, *accumulate(counts)]))
    regular = all((end - start) % size == 0 for start, end in pairwise(bounds))
    return ChunkLayout(
        size, len(counts), len(chunks), regular, *(table.to(device, non_blocking=True) for table in tables)
    )
