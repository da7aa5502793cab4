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
    x, y, states, total_ptr, first_ptr, last_ptr, bounds_ptr, chunk_bounds_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, BT: tl.constexpr, STAGES: tl.constexpr, BLOCKS: tl.constexpr,
    REVERSE: tl.constexpr, REGULAR: tl.constexpr, HAS_FIRST: tl.constexpr, STORE_LAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk one sequence with a [BK, BV] tile of the state in registers; write it in front of each chunk.

    x [T, H, K], y [T, H, V], total [chunks, H, K], states [chunks, H, K, V], first and last [N, H, K, V].
    BLOCKS: x, y and states are tensor descriptors (models/ops/descriptors.py), faster where the state is
    large; else pointers. REGULAR: all chunks are full, so that no row is another sequence's.
    """
    i_n, i_h = tl.program_id(2) // H, tl.program_id(2) % H
    at_k, at_v = tl.program_id(1) * BK, tl.program_id(0) * BV
    column_k, column_v = at_k + tl.arange(0, BK), at_v + tl.arange(0, BV)
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
    for step in tl.range(0, steps, num_stages=STAGES):
        at = steps - 1 - step if REVERSE else step
        head = (first_chunk + at // pieces) * H + i_h  # of this chunk, in total and states
        token = begin + at * BT
        inside = (row < end - token)[:, None]
        if BLOCKS:
            x_piece, y_piece = x.load([token, i_h * K + at_k]), y.load([token, i_h * V + at_v])
            if not REGULAR:
                x_piece, y_piece = tl.where(inside, x_piece, 0.0), tl.where(inside, y_piece, 0.0)
        else:
            here = token.to(tl.int64) * H + i_h
            x_piece = tl.load(x + here * K + in_x, mask=inside, other=0.0)
            y_piece = tl.load(y + here * V + in_y, mask=inside, other=0.0)
        # of every step, not of a chunk's first alone: it is then on its way while other steps compute
        decay = tl.exp2(tl.load(total_ptr + head.to(tl.int64) * K + column_k))
        if step % pieces == 0:
            if BLOCKS:
                states.store([head * K + at_k, at_v], state.to(states.dtype))
            else:
                states_at = states + head.to(tl.int64) * (K * V) + in_state
                tl.store(states_at, state.to(states.dtype.element_ty))
            state *= decay[:, None]
        state = tl.dot(tl.trans(x_piece), y_piece, state, input_precision=PRECISION)
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
    do, v, states, dstates, states_ptr, dstates_ptr, dqueries_ptr, dkeys_ptr, product_ptr, chunks_ptr,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    BM: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, STAGES: tl.constexpr, BLOCKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dqueries = do state^T, dkeys = v dstate^T [T, H, K], sum over V of state * dstate [chunks, H, K].

    BLOCKS: do, v, states and dstates are tensor descriptors, as in `march_kernel`; else pointers.
    """
    tiles: tl.constexpr = C // BM
    i_c, i_m, i_h = tl.program_id(1) // tiles, tl.program_id(1) % tiles, tl.program_id(2)
    start, end = tl.load(chunks_ptr + 2 * i_c), tl.load(chunks_ptr + 2 * i_c + 1)
    length = tl.minimum(C, end - start)
    if i_m * BM < length:
        at_k = tl.program_id(0) * BK
        column_k = at_k + tl.arange(0, BK)
        row = i_m * BM + tl.arange(0, BM)
        along_v = tl.arange(0, BV)
        head = start.to(tl.int64) * H + i_h
        inside = (row < length)[:, None]
        in_tokens = head * V + row[:, None] * (H * V) + along_v[None, :]
        in_states = (i_c.to(tl.int64) * H + i_h) * (K * V) + column_k[:, None] * V + along_v[None, :]
        state_row = (i_c * H + i_h) * K + at_k

        # `end > 0` is always so, but unknown to the compiler where a chunk is one tile: reads without a
        # condition would be pipelined, and what is pipelined would not fit
        sums_product = (i_m == 0) & (end > 0)

        dqueries = tl.zeros([BM, BK], dtype=tl.float32)
        dkeys = tl.zeros([BM, BK], dtype=tl.float32)
        products = tl.zeros([BK, BV], dtype=tl.float32)
        for n in tl.range(0, V, BV, num_stages=STAGES):
            # read apart from the products' operands: Triton 3.6 gives a tile that feeds both wgmma and
            # arithmetic one buffer too few, and overwrites it while the tensor cores still read
            again = tl.zeros([BK, BV], dtype=states_ptr.dtype.element_ty)
            dagain = tl.zeros([BK, BV], dtype=states_ptr.dtype.element_ty)
            if sums_product:
                again, dagain = tl.load(states_ptr + in_states + n), tl.load(dstates_ptr + in_states + n)
            if BLOCKS:
                do_piece = do.load([start + i_m * BM, i_h * V + n])
                v_piece = v.load([start + i_m * BM, i_h * V + n])
                state, dstate = states.load([state_row, n]), dstates.load([state_row, n])
            else:
                do_piece = tl.load(do + in_tokens + n, mask=inside, other=0.0)
                v_piece = tl.load(v + in_tokens + n, mask=inside, other=0.0)
                state, dstate = tl.load(states + in_states + n), tl.load(dstates + in_states + n)
            dqueries = tl.dot(do_piece, tl.trans(state), dqueries, input_precision=PRECISION)
            dkeys = tl.dot(v_piece, tl.trans(dstate), dkeys, input_precision=PRECISION)
            products += again.to(tl.float32) * dagain.to(tl.float32)
        in_out = head * K + row[:, None] * (H * K) + column_k[None, :]
        tl.store(dqueries_ptr + in_out, dqueries.to(dqueries_ptr.dtype.element_ty), mask=inside)
        tl.store(dkeys_ptr + in_out, dkeys.to(dkeys_ptr.dtype.element_ty), mask=inside)
        if sums_product:
            product_at = product_ptr + (i_c.to(tl.int64) * H + i_h) * K + column_k
            tl.store(product_at, tl.sum(products, axis=1))


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
