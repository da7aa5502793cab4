"""Triton kernels of chunked GLA that touch the state [K, V]: all of them are plain tiled matrix products.

The decays are already inside their operands (`gla_triton_intra.prepare_kernel`): queries decayed from the
start of their chunk, keys to its end. So the forward and the backward pass are the same three kernels:

    march   h_{c+1} = exp(G_c) h_c + keys_c^T v_c          dh_{c-1} = exp(G_c) dh_c + queries_c^T do_c
    mix     o_c     = queries_c h_c + A_c v_c              dv_c     = keys_c dh_c + A_c^T do_c
    grad                                                   dqueries_c = do_c h_c^T, dkeys_c = v_c dh_c^T

with G_c a chunk's total log decay and A_c the scores within the chunk. A chunk is C tokens of one sequence;
`chunks_ptr` holds (first token, end of its sequence) of each. States are stored once a chunk, in the
operands' precision.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/gla_triton_state.py needs triton") from error


@triton.jit
def march_kernel(
    x_ptr, y_ptr, total_ptr, states_ptr, first_ptr, last_ptr, bounds_ptr, chunk_bounds_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr,
    REVERSE: tl.constexpr, HAS_FIRST: tl.constexpr, STORE_LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one sequence with a [BK, BV] tile of the state in registers; write it in front of each chunk.

    x [T, H, K], y [T, H, V], total [chunks, H, K], states [chunks, H, K, V], first and last [N, H, K, V].
    """
    i_n, i_h = tl.program_id(2) // H, tl.program_id(2) % H
    column_k = tl.program_id(1) * BK + tl.arange(0, BK)
    column_v = tl.program_id(0) * BV + tl.arange(0, BV)
    row = tl.arange(0, BT)
    begin, end = tl.load(bounds_ptr + i_n), tl.load(bounds_ptr + i_n + 1)
    first_chunk, end_chunk = tl.load(chunk_bounds_ptr + i_n), tl.load(chunk_bounds_ptr + i_n + 1)
    in_state = column_k[:, None] * V + column_v[None, :]
    in_x = row[:, None] * (H * K) + column_k[None, :]
    in_y = row[:, None] * (H * V) + column_v[None, :]
    outer = (i_n.to(tl.int64) * H + i_h) * K * V

    state = tl.zeros([BK, BV], dtype=tl.float32)
    if HAS_FIRST:
        state = tl.load(first_ptr + outer + in_state).to(tl.float32)
    pieces: tl.constexpr = C // BT
    steps = (end_chunk - first_chunk) * pieces
    one_chunk = -H * K if REVERSE else H * K
    total_at = total_ptr + ((end_chunk - 1 if REVERSE else first_chunk) * H + i_h).to(tl.int64) * K + column_k
    coming = tl.load(total_at, mask=(column_k < K) & (steps > 0), other=0.0)
    for step in range(steps):
        at = steps - 1 - step if REVERSE else step
        head = ((first_chunk + at // pieces) * H + i_h).to(tl.int64)  # of this chunk, in total and states
        token = begin + at * BT
        here = (token.to(tl.int64) * H + i_h) * K
        there = (token.to(tl.int64) * H + i_h) * V
        inside = (row < end - token)[:, None]
        x = tl.load(x_ptr + here + in_x, mask=inside, other=0.0)
        y = tl.load(y_ptr + there + in_y, mask=inside, other=0.0)
        at_chunk = step % pieces == 0
        if at_chunk:
            tl.store(states_ptr + head * (K * V) + in_state, state.to(states_ptr.dtype.element_ty))
        state = state * tl.exp2(tl.where(at_chunk, coming, 0.0))[:, None]
        # the next step's decay is on its way while this step computes
        next_chunk = (step + 1) // pieces
        coming = tl.load(
            total_at + next_chunk * one_chunk, mask=(column_k < K) & (step + 1 < steps), other=0.0
        )
        state = tl.dot(tl.trans(x), y, state, input_precision=PRECISION)
    if STORE_LAST:
        tl.store(last_ptr + outer + in_state, state)


@triton.jit
def mix_kernel(
    x_ptr, states_ptr, scores_ptr, y_ptr, out_ptr, chunks_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr,
    TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x state + scores y (TRANSPOSED: scores^T y): what comes from before the chunk and from within.

    x [T, H, K], states [chunks, H, K, V], scores [T, H, C], y and out [T, H, V].
    """
    tiles: tl.constexpr = C // BM
    i_c, i_m, i_h = tl.program_id(1) // tiles, tl.program_id(1) % tiles, tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    length = tl.minimum(C, end - start)
    if i_m * BM < length:
        column_v = tl.program_id(0) * BV + tl.arange(0, BV)
        row = i_m * BM + tl.arange(0, BM)
        along_k, along_n = tl.arange(0, BK), tl.arange(0, BN)
        head = start.to(tl.int64) * H + i_h  # of the chunk's first token
        inside = (row < length)[:, None]

        x_at = x_ptr + head * K + row[:, None] * (H * K) + along_k[None, :]
        state_at = (
            states_ptr + (i_c.to(tl.int64) * H + i_h) * (K * V) + along_k[:, None] * V + column_v[None, :]
        )
        acc = tl.zeros([BM, BV], dtype=tl.float32)
        for k in range(0, K, BK):
            x = tl.load(x_at + k, mask=inside, other=0.0)
            state = tl.load(state_at + k * V)
            acc = tl.dot(x, state, acc, input_precision=PRECISION)

        y_at = y_ptr + head * V + along_n[:, None] * (H * V) + column_v[None, :]
        scores_at = scores_ptr + head * C
        if TRANSPOSED:
            for n in range(i_m * BM, length, BN):
                later = (n + along_n < length)[:, None]
                a = tl.load(
                    scores_at + (n + along_n)[:, None] * (H * C) + row[None, :], mask=later, other=0.0
                )
                y = tl.load(y_at + n * (H * V), mask=later, other=0.0)
                acc = tl.dot(tl.trans(a), y, acc, input_precision=PRECISION)
        else:
            for n in range(0, (i_m + 1) * BM, BN):
                a = tl.load(
                    scores_at + row[:, None] * (H * C) + (n + along_n)[None, :], mask=inside, other=0.0
                )
                y = tl.load(y_at + n * (H * V), mask=(n + along_n < length)[:, None], other=0.0)
                acc = tl.dot(a, y, acc, input_precision=PRECISION)
        out_at = out_ptr + head * V + row[:, None] * (H * V) + column_v[None, :]
        tl.store(out_at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def grad_kernel(
    do_ptr, v_ptr, states_ptr, dstates_ptr, dqueries_ptr, dkeys_ptr, product_ptr, chunks_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dqueries = do state^T, dkeys = v dstate^T [T, H, K], sum over V of state * dstate [chunks, H, K]."""
    tiles: tl.constexpr = C // BM
    i_c, i_m, i_h = tl.program_id(1) // tiles, tl.program_id(1) % tiles, tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    length = tl.minimum(C, end - start)
    if i_m * BM < length:
        column_k = tl.program_id(0) * BK + tl.arange(0, BK)
        row = i_m * BM + tl.arange(0, BM)
        along_v = tl.arange(0, BV)
        head = start.to(tl.int64) * H + i_h
        inside = (row < length)[:, None]
        in_tokens = head * V + row[:, None] * (H * V) + along_v[None, :]
        in_states = (i_c.to(tl.int64) * H + i_h) * (K * V) + column_k[:, None] * V + along_v[None, :]

        dqueries = tl.zeros([BM, BK], dtype=tl.float32)
        dkeys = tl.zeros([BM, BK], dtype=tl.float32)
        product = tl.zeros([BK], dtype=tl.float32)
        for n in range(0, V, BV):
            do = tl.load(do_ptr + in_tokens + n, mask=inside, other=0.0)
            v = tl.load(v_ptr + in_tokens + n, mask=inside, other=0.0)
            state = tl.load(states_ptr + in_states + n)
            dstate = tl.load(dstates_ptr + in_states + n)
            dqueries = tl.dot(do, tl.trans(state), dqueries, input_precision=PRECISION)
            dkeys = tl.dot(v, tl.trans(dstate), dkeys, input_precision=PRECISION)
            if i_m == 0:
                # read again: Triton 3.6 gives a tile that feeds both wgmma and arithmetic one buffer too few,
                # and overwrites it while the tensor cores still read
                again = tl.load(states_ptr + in_states + n).to(tl.float32)
                product += tl.sum(again * tl.load(dstates_ptr + in_states + n).to(tl.float32), axis=1)
        in_out = head * K + row[:, None] * (H * K) + column_k[None, :]
        tl.store(dqueries_ptr + in_out, dqueries.to(dqueries_ptr.dtype.element_ty), mask=inside)
        tl.store(dkeys_ptr + in_out, dkeys.to(dkeys_ptr.dtype.element_ty), mask=inside)
        if i_m == 0:
            tl.store(product_ptr + (i_c.to(tl.int64) * H + i_h) * K + column_k, product)


@triton.jit
def dscores_kernel(
    do_ptr, v_ptr, dscores_ptr, chunks_ptr, scale,
    H: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dscores [T, H, C] = scale * do v^T within each chunk, zero for keys behind the query."""
    tiles: tl.constexpr = C // BM
    i_n = tl.program_id(0)
    i_c, i_m, i_h = tl.program_id(1) // tiles, tl.program_id(1) % tiles, tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    length = tl.minimum(C, end - start)
    if (i_n <= i_m) & (i_m * BM < length):
        row, column = i_m * BM + tl.arange(0, BM), i_n * BM + tl.arange(0, BM)
        along_v = tl.arange(0, BV)
        head = start.to(tl.int64) * H + i_h
        acc = tl.zeros([BM, BM], dtype=tl.float32)
        do_at = do_ptr + head * V + row[:, None] * (H * V) + along_v[None, :]
        v_at = v_ptr + head * V + column[:, None] * (H * V) + along_v[None, :]
        for n in range(0, V, BV):
            do = tl.load(do_at + n, mask=(row < length)[:, None], other=0.0)
            v = tl.load(v_at + n, mask=(column < length)[:, None], other=0.0)
            acc = tl.dot(do, tl.trans(v), acc, input_precision=PRECISION)
        acc = tl.where(row[:, None] >= column[None, :], acc * scale, 0.0)
        out_at = dscores_ptr + head * C + row[:, None] * (H * C) + column[None, :]
        tl.store(out_at, acc.to(dscores_ptr.dtype.element_ty), mask=(row < length)[:, None])
