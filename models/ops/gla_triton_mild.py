"""Triton kernels of chunked GLA within chunks that decay mildly: one factored product a chunk, no halving.

Where a chunk's total log decay (base 2) lies above a bound, decays of a whole chunk factor into q exp2(B - c)
and k exp2(c - B) without leaving float32's and bfloat16's range, B the running sum over the chunk. Stronger
chunks are left to the kernels of `gla_triton_intra`, which are launched too and return at once from the
chunks done here: the choice is made on the device, chunk by chunk.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/gla_triton_mild.py needs triton") from error

from .gla_triton_intra import BLOCK, MILD, gate_gradient, is_mild


@triton.jit
def mild_scores_kernel(
    queries_ptr, keys_ptr, total_ptr, scores_ptr, chunks_ptr,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores [T, H, C] of mild chunks from queries and keys already decayed to the chunk's two ends."""
    tiles: tl.constexpr = C // BM
    i_n = tl.program_id(0)
    i_c, i_m, i_h = tl.program_id(1) // tiles, tl.program_id(1) % tiles, tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    length = tl.minimum(C, end - start)
    total_at = total_ptr + (i_c.to(tl.int64) * H + i_h) * K
    if (i_m * BM < length) & is_mild(total_at, MILD, K):
        row, column = i_m * BM + tl.arange(0, BM), i_n * BM + tl.arange(0, BM)
        along_k = tl.arange(0, BK)
        inside = (row < length)[:, None]
        head = start.to(tl.int64) * H + i_h
        q_at = queries_ptr + head * K + row[:, None] * (H * K) + along_k[None, :]
        k_at = keys_ptr + head * K + column[:, None] * (H * K) + along_k[None, :]
        acc = tl.zeros([BM, BM], dtype=tl.float32)
        if i_n <= i_m:
            for n in range(0, K, BK):
                q = tl.load(q_at + n, mask=inside, other=0.0)
                k = tl.load(k_at + n, mask=(column < length)[:, None], other=0.0)
                back = tl.exp2(-tl.load(total_at + n + along_k))[None, :]  # both decays hold the total once
                acc = tl.dot((q * back).to(k.dtype), tl.trans(k), acc, input_precision=PRECISION)
        acc = tl.where(row[:, None] >= column[None, :], acc, 0.0)
        out_at = scores_ptr + head * C + row[:, None] * (H * C) + column[None, :]
        tl.store(out_at, acc.to(scores_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _chunk_decay(b_ptr, at, column, row, length, C: tl.constexpr, width: tl.constexpr):
    """Log decay from the start of the chunk, from b, which starts anew every BLOCK rows."""
    b = tl.load(b_ptr + at, mask=(row < length)[:, None], other=0.0)
    for n in tl.static_range(BLOCK, C, BLOCK):
        block_total = tl.load(b_ptr + (n - 1) * width + column, mask=(column >= 0) & (n <= length), other=0.0)
        b += tl.where((row >= n)[:, None], block_total[None, :], 0.0)
    return b


@triton.jit
def mild_backward_kernel(
    q_ptr, k_ptr, g_ptr, b_ptr, total_ptr, dscores_ptr, dqueries_ptr, dkeys_ptr, product_ptr,
    dq_ptr, dk_ptr, dg_ptr, chunks_ptr, scale, gate_scale, clamp_min,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`intra_backward_kernel` for BK columns of a chunk whose decay is mild, BM rows at a time.

    Both halves of the gate's gradient use the operands as rounded for the products, so that what a pair of
    tokens adds at its query it takes back at its key, to float32.
    """
    i_c, i_h = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    length = tl.minimum(C, end - start)
    width: tl.constexpr = H * K
    first_column = tl.program_id(0) * BK
    at_chunk = (i_c.to(tl.int64) * H + i_h) * K + first_column
    if is_mild(total_ptr + at_chunk, 2 * MILD, BK):  # decays are taken from half way: twice the reach
        column = first_column + tl.arange(0, BK)
        head = (start.to(tl.int64) * H + i_h) * K
        q_ptr, k_ptr, g_ptr, b_ptr = q_ptr + head, k_ptr + head, g_ptr + head, b_ptr + head
        dq_ptr, dk_ptr, dg_ptr = dq_ptr + head, dk_ptr + head, dg_ptr + head
        dqueries_ptr, dkeys_ptr = dqueries_ptr + head, dkeys_ptr + head
        dscores_ptr += (start.to(tl.int64) * H + i_h) * C
        dtype = q_ptr.dtype.element_ty
        tile = tl.arange(0, BM)
        # dscores exist where a key's block is not behind the query's
        written = (tile // BLOCK)[:, None] >= (tile // BLOCK)[None, :]

        center = 0.5 * tl.load(total_ptr + at_chunk + tl.arange(0, BK))
        half = tl.exp2(center)  # decay over half the way
        later = half * half * tl.load(product_ptr + at_chunk + tl.arange(0, BK))
        blocks = tl.cdiv(length, BM)
        for step in range(blocks):
            i = blocks - 1 - step
            row = i * BM + tile
            at, inside = row[:, None] * width + column[None, :], (row < length)[:, None]
            # other blocks first: less is held in registers across these loops
            dq = tl.zeros([BM, BK], dtype=tl.float32)
            dk = tl.zeros([BM, BK], dtype=tl.float32)
            before = tl.zeros([BK], dtype=tl.float32)  # what keys of earlier blocks carry out of the chunk
            if C > BM:
                for j in range(i):
                    there = j * BM + tile
                    at_j = there[:, None] * width + column[None, :]
                    gap = center[None, :] - _chunk_decay(b_ptr, at_j, column, there, length, C, width)
                    key_j = (tl.load(k_ptr + at_j).to(tl.float32) * tl.exp2(gap)).to(dtype)
                    ds_at = dscores_ptr + row[:, None] * (H * C) + there[None, :]
                    ds = tl.load(ds_at, mask=inside, other=0.0)
                    dq = tl.dot(ds, key_j, dq, input_precision=PRECISION)
                    carried = key_j.to(tl.float32) * tl.load(dkeys_ptr + at_j).to(tl.float32)
                    before += half * tl.sum(carried, axis=0)
                for j in range(i + 1, blocks):
                    there = j * BM + tile
                    at_j, inside_j = there[:, None] * width + column[None, :], (there < length)[:, None]
                    gap = _chunk_decay(b_ptr, at_j, column, there, length, C, width) - center[None, :]
                    query_j = tl.load(q_ptr + at_j, mask=inside_j, other=0.0).to(tl.float32)
                    ds_at = dscores_ptr + there[:, None] * (H * C) + row[None, :]
                    ds = tl.load(ds_at, mask=inside_j, other=0.0)
                    query_j = (query_j * tl.exp2(gap)).to(dtype)
                    dk = tl.dot(tl.trans(ds), query_j, dk, input_precision=PRECISION)

            gap = _chunk_decay(b_ptr, at, column, row, length, C, width) - center[None, :]
            of_q, of_k = tl.exp2(gap), tl.exp2(-gap)
            q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
            k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
            query, key = (q * of_q).to(dtype), (k * of_k).to(dtype)
            ds_at = dscores_ptr + row[:, None] * (H * C) + row[None, :]
            ds = tl.load(ds_at, mask=inside & written, other=0.0)
            dqueries = tl.load(dqueries_ptr + at, mask=inside, other=0.0)  # on their way during the products
            dkeys = tl.load(dkeys_ptr + at, mask=inside, other=0.0)
            dq = tl.dot(ds, key, dq, input_precision=PRECISION)
            dk = tl.dot(tl.trans(ds), query, dk, input_precision=PRECISION)
            dq += dqueries.to(tl.float32) * (scale * half)[None, :]
            tl.store(dq_ptr + at, (dq * of_q).to(dtype), mask=inside)
            dkeys = dkeys.to(tl.float32) * half[None, :]
            gained = query.to(tl.float32) * dq - key.to(tl.float32) * dk  # keys' part within the chunk
            crossing = gained - key.to(tl.float32) * dkeys
            tl.store(dk_ptr + at, ((dk + dkeys) * of_k).to(dtype), mask=inside)
            if GATED:
                x = tl.load(g_ptr + at, mask=inside, other=0.0)
            gained_here = tl.sum(gained, axis=0)
            dg = (later + before + gained_here)[None, :] - (tl.cumsum(crossing, axis=0) - crossing)
            later += gained_here
            if GATED:
                dg = gate_gradient(dg, x.to(tl.float32), gate_scale, clamp_min, CLAMP)
            tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=inside)
