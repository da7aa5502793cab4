"""Triton kernels of chunked GLA within a chunk: decays, scores, and the last step of the backward pass.

Log decays are kept in base 2 and summed from the start of blocks of 64 tokens: b_i = log2(e) (g_1 + .. g_i).
Between two blocks keys decay to the end of theirs and queries from the start of theirs, so no exponent is
above 0. Within a block exponents are taken around its middle row as long as the block decays by no more than
2^-100; a stronger one is halved six times, later half against earlier half (as `gla.decayed_scores`).
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/gla_triton_intra.py needs triton") from error

BLOCK = tl.constexpr(64)
LEVELS = tl.constexpr(6)  # BLOCK = 2 ** LEVELS
MILD = tl.constexpr(
    -100.0
)  # log2 of the decay over a block up to which its inverse is used; float32 ends at 127
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def is_mild(total_ptr, bound, WIDTH: tl.constexpr):
    """Whether WIDTH channels of a chunk all have a total log decay above a bound."""
    return tl.min(tl.load(total_ptr + tl.arange(0, WIDTH)), axis=0) > bound


@triton.jit
def _log2_sigmoid(x):
    """log2(sigmoid(x)) = min(x', 0) - log2(1 + 2^-|x'|) with x' = x log2(e).

    log2(1 + u) = u P(u) on [0, 1], P interpolated at Chebyshev's points: within 4e-7, relative. The library's
    logarithm takes several times as many instructions.
    """
    x = x * LOG2_E
    u = tl.exp2(-tl.abs(x))
    p = -0.0120770203 * u + 0.0627484336
    p = p * u - 0.154152006
    p = p * u + 0.255176349
    p = p * u - 0.353096353
    p = p * u + 0.480012461
    p = p * u - 0.721306757
    p = p * u + 1.44269472
    return tl.minimum(x, 0.0) - u * p


@triton.jit
def _log_decay(x, inside, gate_scale, clamp_min, GATED: tl.constexpr, CLAMP: tl.constexpr):
    """Base-2 log decay of each token from the natural one, or from the gate's logits; 0 outside."""
    if GATED:
        x = _log2_sigmoid(x) * gate_scale
        if CLAMP:
            x = tl.maximum(x, clamp_min * LOG2_E)
    else:
        x = x * LOG2_E
    return tl.where(inside, x, 0.0)


@triton.jit
def gate_gradient(dg, x, gate_scale, clamp_min, CLAMP: tl.constexpr):
    """Gradient of the logits x from that of the log decay."""
    if CLAMP:
        dg = tl.where(_log2_sigmoid(x) * gate_scale > clamp_min * LOG2_E, dg, 0.0)
    return dg * gate_scale / (1.0 + tl.exp2(x * LOG2_E))


@triton.jit
def prepare_kernel(
    q_ptr, k_ptr, g_ptr, queries_ptr, keys_ptr, b_ptr, total_ptr, chunks_ptr, scale, gate_scale, clamp_min,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr,
):  # fmt: skip
    """queries = scale q decayed from the chunk's start, keys = k decayed to its end; b, and totals."""
    i_c, i_h = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    length = tl.minimum(C, end - start)
    column = tl.program_id(0) * BK + tl.arange(0, BK)
    row = tl.arange(0, BLOCK)
    head = (start.to(tl.int64) * H + i_h) * K
    base = head + row[:, None] * (H * K) + column[None, :]

    total = tl.zeros([BK], dtype=tl.float32)
    for first in range(0, length, BLOCK):
        inside = (first + row < length)[:, None]
        at = base + first * (H * K)
        g = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
        q = tl.load(q_ptr + at, mask=inside, other=0.0)  # on its way while g is summed
        b = tl.cumsum(_log_decay(g, inside, gate_scale, clamp_min, GATED, CLAMP), axis=0)
        tl.store(b_ptr + at, b, mask=inside)
        q = q.to(tl.float32) * scale * tl.exp2(b + total[None, :])
        tl.store(queries_ptr + at, q.to(queries_ptr.dtype.element_ty), mask=inside)
        total += tl.min(b, axis=0)  # b falls: its least value is the last
    tl.store(total_ptr + (i_c.to(tl.int64) * H + i_h) * K + column, total)

    tl.debug_barrier()  # the other threads' b is read back: cheaper than to sum it again
    after = tl.zeros([BK], dtype=tl.float32)
    blocks = tl.cdiv(length, BLOCK)
    for i in range(blocks):
        first = (blocks - 1 - i) * BLOCK
        inside = (first + row < length)[:, None]
        at = base + first * (H * K)
        last = tl.minimum(first + BLOCK, length) - 1
        block_total = tl.load(b_ptr + head + last * (H * K) + column)
        b = tl.load(b_ptr + at, mask=inside, other=0.0)
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
        k = k * tl.exp2(tl.minimum(block_total[None, :] - b, 0.0) + after[None, :])
        tl.store(keys_ptr + at, k.to(keys_ptr.dtype.element_ty), mask=inside)
        after += block_total


@triton.jit
def _around(b, b_at, row, length, bit, stride: tl.constexpr):
    """Decays (of queries, of keys) of one halving: later and earlier half to the boundary between them.

    Halves are 2 ** bit rows; rows of the other half get 0. `b_at` points at the block's first row.
    """
    edge = tl.minimum(((row >> (bit + 1)) << (bit + 1)) + (1 << bit) - 1, length - 1)
    gap = b - tl.load(b_at + edge[:, None] * stride)
    later = (((row >> bit) & 1) == 1)[:, None]
    of_q = tl.where(later, tl.minimum(gap, 0.0), -float("inf"))
    of_k = tl.where(later, -float("inf"), tl.minimum(-gap, 0.0))
    return tl.exp2(of_q), tl.exp2(of_k)


@triton.jit
def _same_pair(row, bit):
    """Whether two rows lie in the same pair of halves of 2 ** bit rows."""
    return (row >> (bit + 1))[:, None] == (row >> (bit + 1))[None, :]


@triton.jit
def scores_kernel(
    q_ptr, k_ptr, b_ptr, total_ptr, scores_ptr, chunks_ptr, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scores [T, H, C] = scale q_i k_j decay(j to i) within each chunk, zero for keys behind the query."""
    blocks: tl.constexpr = C // BLOCK
    i_n = tl.program_id(0)
    i_c, i_m, i_h = tl.program_id(1) // blocks, tl.program_id(1) % blocks, tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    length = tl.minimum(C, end - start) - i_m * BLOCK  # valid rows of this block
    mild = is_mild(total_ptr + (i_c.to(tl.int64) * H + i_h) * K, MILD, K)
    if (length > 0) & (not mild):  # mild chunks are mild_scores_kernel's
        row, along_k = tl.arange(0, BLOCK), tl.arange(0, BK)
        inside = (row < length)[:, None]
        head = start.to(tl.int64) * H + i_h
        in_block = row[:, None] * (H * K) + along_k[None, :]
        q_block = head * K + i_m * BLOCK * (H * K)
        k_block = head * K + i_n * BLOCK * (H * K)
        last = (BLOCK - 1) * (H * K)
        acc = tl.zeros([BLOCK, BLOCK], dtype=tl.float32)
        if i_n < i_m:
            for n in range(0, K, BK):
                q = tl.load(q_ptr + q_block + in_block + n, mask=inside, other=0.0)
                b = tl.load(b_ptr + q_block + in_block + n, mask=inside, other=0.0)
                k = tl.load(k_ptr + k_block + in_block + n)
                b_key = tl.load(b_ptr + k_block + in_block + n)
                gap = tl.load(b_ptr + k_block + last + n + along_k)  # to the end of the key's block
                between = tl.zeros([BK], dtype=tl.float32)
                for j in range(i_n + 1, i_m):
                    between += tl.load(b_ptr + head * K + (j * BLOCK) * (H * K) + last + n + along_k)
                query = (q.to(tl.float32) * tl.exp2(b)).to(q.dtype)
                key = (k.to(tl.float32) * tl.exp2(gap[None, :] - b_key + between[None, :])).to(q.dtype)
                acc = tl.dot(query, tl.trans(key), acc, input_precision=PRECISION)
        if i_n == i_m:
            for n in range(0, K, BK):
                q = tl.load(q_ptr + q_block + in_block + n, mask=inside, other=0.0).to(tl.float32)
                k = tl.load(k_ptr + q_block + in_block + n, mask=inside, other=0.0).to(tl.float32)
                b = tl.load(b_ptr + q_block + in_block + n, mask=inside, other=0.0)
                if tl.min(b) > MILD:
                    middle = tl.minimum(BLOCK // 2 - 1, length - 1) * (H * K)
                    center = tl.load(b_ptr + q_block + middle + n + along_k)
                    query = (q * tl.exp2(b - center[None, :])).to(q_ptr.dtype.element_ty)
                    key = (k * tl.exp2(center[None, :] - b)).to(q_ptr.dtype.element_ty)
                    acc = tl.dot(query, tl.trans(key), acc, input_precision=PRECISION)
                else:
                    acc += tl.where(row[:, None] == row[None, :], tl.sum(q * k, axis=1)[:, None], 0.0)
                    b_at = b_ptr + q_block + n + along_k[None, :]
                    for bit in range(LEVELS):
                        of_q, of_k = _around(b, b_at, row, length, bit, H * K)
                        query, key = (
                            (q * of_q).to(q_ptr.dtype.element_ty),
                            (k * of_k).to(q_ptr.dtype.element_ty),
                        )
                        part = tl.dot(query, tl.trans(key), input_precision=PRECISION)
                        acc += tl.where(_same_pair(row, bit), part, 0.0)
            acc = tl.where(row[:, None] >= row[None, :], acc, 0.0)
        column = i_n * BLOCK + row
        out_at = scores_ptr + (head + i_m * BLOCK * H) * C + row[:, None] * (H * C) + column[None, :]
        tl.store(out_at, (acc * scale).to(scores_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _through_block(
    ds, other, b, b_at, row, length, dtype,
    OF_KEYS: tl.constexpr, stride: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of a block's queries (or keys) through its own decayed scores, the diagonal left out."""
    ds = tl.where(row[:, None] > row[None, :], ds, 0.0)
    out = tl.zeros_like(other)
    if tl.min(b) > MILD:
        center = tl.load(b_at + tl.minimum(BLOCK // 2 - 1, length - 1) * stride)  # [1, BK]
        if OF_KEYS:
            part = tl.dot(
                tl.trans(ds.to(dtype)), (other * tl.exp2(b - center)).to(dtype), input_precision=PRECISION
            )
            out += part * tl.exp2(center - b)
        else:
            part = tl.dot(ds.to(dtype), (other * tl.exp2(center - b)).to(dtype), input_precision=PRECISION)
            out += part * tl.exp2(b - center)
    else:
        for bit in range(LEVELS):
            of_q, of_k = _around(b, b_at, row, length, bit, stride)
            level = tl.where(_same_pair(row, bit), ds, 0.0).to(dtype)
            if OF_KEYS:
                out += tl.dot(tl.trans(level), (other * of_q).to(dtype), input_precision=PRECISION) * of_k
            else:
                out += tl.dot(level, (other * of_k).to(dtype), input_precision=PRECISION) * of_q
    return out


@triton.jit
def _carried_out(
    k_ptr, b_ptr, dkeys_ptr, carried, offset, row, chunk_length, blocks, width: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """`carried` plus the sum over a chunk of k dk through the state behind it."""
    after = tl.zeros([BK], dtype=tl.float32)  # log decay from the end of a block to the end of the chunk
    for step in range(blocks):
        first = (blocks - 1 - step) * BLOCK
        at, inside = offset + first * width, (first + row < chunk_length)[:, None]
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + at, mask=inside, other=0.0)
        dkeys = tl.load(dkeys_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.min(b, axis=0)
        carried += tl.sum(k * dkeys * tl.exp2(tl.minimum(total[None, :] - b, 0.0) + after[None, :]), axis=0)
        after += total
    return carried


@triton.jit
def _columns_backward(
    q_ptr, k_ptr, g_ptr, b_ptr, total_ptr, dscores_ptr, dqueries_ptr, dkeys_ptr, product_ptr,
    dq_ptr, dk_ptr, dg_ptr, chunks_ptr, scale, gate_scale, clamp_min, first_column,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg of BK columns of one chunk: the parts from within, joined with those through the states.

    A gate at token t touches whatever crosses it, so its gradient is a running sum (arXiv 2312.06635, C):
    dg_t = sum over s >= t of (q_s dq_s - k_s dk_s), plus all that leaves the chunk: the sums of k dk through
    the state behind it, and of the state in front times its gradient. A token with itself has no decay.
    """
    i_c, i_h = tl.program_id(1), tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    chunk_length = tl.minimum(C, end - start)
    blocks = tl.cdiv(chunk_length, BLOCK)
    width: tl.constexpr = H * K
    row, column = tl.arange(0, BLOCK), first_column + tl.arange(0, BK)
    offset = row[:, None] * width + column[None, :]
    score_offset = row[:, None] * (H * C) + row[None, :]
    head = (start.to(tl.int64) * H + i_h) * K
    q_ptr, k_ptr, g_ptr, b_ptr = q_ptr + head, k_ptr + head, g_ptr + head, b_ptr + head
    dq_ptr, dk_ptr, dg_ptr = dq_ptr + head, dk_ptr + head, dg_ptr + head
    dqueries_ptr, dkeys_ptr = dqueries_ptr + head, dkeys_ptr + head
    dscores_ptr += (start.to(tl.int64) * H + i_h) * C
    dtype = q_ptr.dtype.element_ty

    at_chunk = (i_c.to(tl.int64) * H + i_h) * K + column
    carried = tl.exp2(tl.load(total_ptr + at_chunk)) * tl.load(product_ptr + at_chunk)
    carried = _carried_out(k_ptr, b_ptr, dkeys_ptr, carried, offset, row, chunk_length, blocks, width, BK)
    for step in range(blocks):
        i = blocks - 1 - step
        length = tl.minimum(BLOCK, chunk_length - i * BLOCK)
        at, inside = offset + i * BLOCK * width, (row < length)[:, None]
        own_at = dscores_ptr + i * BLOCK * (H * C) + i * BLOCK + score_offset
        b = tl.load(b_ptr + at, mask=inside, other=0.0)
        b_at = b_ptr + i * BLOCK * width + column[None, :]

        dq = tl.zeros([BLOCK, BK], dtype=tl.float32)
        before = tl.zeros([BK], dtype=tl.float32)
        for back in range(i):
            j = i - 1 - back
            b_key = tl.load(b_ptr + offset + j * BLOCK * width)
            total = tl.min(b_key, axis=0)
            key = tl.load(k_ptr + offset + j * BLOCK * width).to(tl.float32)
            key = key * tl.exp2(total[None, :] - b_key + before[None, :])
            ds_at = dscores_ptr + i * BLOCK * (H * C) + j * BLOCK + score_offset
            ds = tl.load(ds_at, mask=inside, other=0.0)
            dq = tl.dot(ds, key.to(dtype), dq, input_precision=PRECISION)
            before += total
        dqueries = tl.load(dqueries_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dq = (dq + dqueries * (tl.exp2(before) * scale)[None, :]) * tl.exp2(b)
        block = tl.load(own_at, mask=inside, other=0.0).to(tl.float32)
        own = tl.sum(tl.where(row[:, None] == row[None, :], block, 0.0), axis=1)[:, None]
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
        dq += _through_block(block, k, b, b_at, row, length, dtype, False, width, PRECISION)
        tl.store(dq_ptr + at, (dq + own * k).to(dtype), mask=inside)
        q = tl.load(q_ptr + at, mask=inside, other=0.0).to(tl.float32)
        crossing = q * dq

        dk = tl.zeros([BLOCK, BK], dtype=tl.float32)
        between = tl.zeros([BK], dtype=tl.float32)
        for ahead in range(step):
            j = i + 1 + ahead
            there = (j * BLOCK + row < chunk_length)[:, None]
            b_query = tl.load(b_ptr + offset + j * BLOCK * width, mask=there, other=0.0)
            query = tl.load(q_ptr + offset + j * BLOCK * width, mask=there, other=0.0).to(tl.float32)
            query = query * tl.exp2(b_query + between[None, :])
            ds_at = dscores_ptr + j * BLOCK * (H * C) + i * BLOCK + score_offset
            ds = tl.load(ds_at, mask=there, other=0.0)
            dk = tl.dot(tl.trans(ds), query.to(dtype), dk, input_precision=PRECISION)
            between += tl.min(b_query, axis=0)
        dkeys = tl.load(dkeys_ptr + at, mask=inside, other=0.0).to(tl.float32)
        total = tl.min(b, axis=0)
        dk = (dk + dkeys * tl.exp2(between)[None, :]) * tl.exp2(tl.minimum(total[None, :] - b, 0.0))
        block = tl.load(own_at, mask=inside, other=0.0).to(tl.float32)
        dk += _through_block(block, q, b, b_at, row, length, dtype, True, width, PRECISION)
        tl.store(dk_ptr + at, (dk + own * q).to(dtype), mask=inside)
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(tl.float32)
        crossing = tl.where(inside, crossing - k * dk, 0.0)

        dg = carried[None, :] + tl.cumsum(crossing, axis=0, reverse=True)
        carried += tl.sum(crossing, axis=0)
        if GATED:
            x = tl.load(g_ptr + at, mask=inside, other=0.0).to(tl.float32)
            dg = gate_gradient(dg, x, gate_scale, clamp_min, CLAMP)
        tl.store(dg_ptr + at, dg.to(dg_ptr.dtype.element_ty), mask=inside)


@triton.jit
def intra_backward_kernel(
    q_ptr, k_ptr, g_ptr, b_ptr, total_ptr, dscores_ptr, dqueries_ptr, dkeys_ptr, product_ptr,
    dq_ptr, dk_ptr, dg_ptr, chunks_ptr, scale, gate_scale, clamp_min,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, TILES: tl.constexpr,
    GATED: tl.constexpr, CLAMP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk and dg [T, H, K] of the tiles of BK columns of a chunk that mild_backward_kernel leaves out.

    A program looks at TILES of them at once: in most there is nothing to do, and few programs fit at a time.
    """
    total_at = total_ptr + (tl.program_id(1).to(tl.int64) * H + tl.program_id(2)) * K
    first = tl.program_id(0) * TILES
    if not is_mild(total_at + first * BK, 2 * MILD, TILES * BK):
        for tile in range(first, first + TILES):
            if not is_mild(total_at + tile * BK, 2 * MILD, BK):
                _columns_backward(
                    q_ptr, k_ptr, g_ptr, b_ptr, total_ptr, dscores_ptr, dqueries_ptr, dkeys_ptr, product_ptr,
                    dq_ptr, dk_ptr, dg_ptr, chunks_ptr, scale, gate_scale, clamp_min, tile * BK,
                    H, K, C, BK, GATED, CLAMP, PRECISION,
                )  # fmt: skip
