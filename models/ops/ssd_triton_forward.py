"""Triton kernels of the SSD operator that its forward pass needs (most of them serve the backward pass too).

Tokens of all sequences lie in one row; a table cuts the row into chunks of at most Q tokens that stop where a
sequence stops. Legend: c chunk, h head, g group, Q chunk length, P head dimension, N state size. Arrays that
only these kernels see are laid out by chunk: `cumulative[c, h, Q]` is the running sum of log2 decays inside a
chunk (places behind the last token repeat it), `steps[c, h, Q]` is dt, `scores[c, g, Q, Q]` is C B^T.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/ssd_triton_forward.py needs triton") from error


@triton.jit
def cumulative_kernel(
    dt_ptr, A_ptr, start_ptr, length_ptr, cumulative_ptr, steps_ptr, dt_stride,
    H: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Running sums of log2 decays, and dt, in chunk layout. Grid: (H / HEADS, chunks)."""
    chunk = tl.program_id(1).to(tl.int64)
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    places = tl.arange(0, Q)
    start, length = tl.load(start_ptr + chunk), tl.load(length_ptr + chunk)
    inside = (places < length)[:, None] & (heads < H)[None, :]
    token = start + places
    dt = tl.load(dt_ptr + token[:, None] * dt_stride + heads[None, :], mask=inside, other=0.0)
    rate = (
        tl.load(A_ptr + heads, mask=heads < H, other=0.0) * 1.4426950408889634
    )  # decays become powers of two
    at = chunk * (H * Q) + heads[None, :] * Q + places[:, None]
    known = (heads < H)[None, :] & (places >= 0)[:, None]
    tl.store(cumulative_ptr + at, tl.cumsum(dt * rate[None, :], axis=0), mask=known)
    tl.store(steps_ptr + at, dt, mask=known)


@triton.jit
def scores_kernel(
    C_ptr, B_ptr, start_ptr, length_ptr, scores_ptr, C_stride, B_stride,
    G: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """scores[c, g, i, j] = C_i . B_j in tiles that touch j <= i. Grid: ((Q / ROWS)^2, G, chunks)."""
    chunk, group = tl.program_id(2).to(tl.int64), tl.program_id(1)
    tile_i, tile_j = tl.program_id(0) // (Q // ROWS), tl.program_id(0) % (Q // ROWS)
    start, length = tl.load(start_ptr + chunk), tl.load(length_ptr + chunk)
    if tile_j > tile_i or length == 0:
        return
    i, j = tile_i * ROWS + tl.arange(0, ROWS), tile_j * ROWS + tl.arange(0, ROWS)
    C_rows = C_ptr + (start + i)[:, None] * C_stride + group * N
    B_rows = B_ptr + (start + j)[:, None] * B_stride + group * N
    total = tl.zeros([ROWS, ROWS], tl.float32)
    for n in range(0, N, BLOCK_N):
        columns = n + tl.arange(0, BLOCK_N)[None, :]
        queries = tl.load(C_rows + columns, mask=(i < length)[:, None], other=0.0)
        keys = tl.load(B_rows + columns, mask=(j < length)[:, None], other=0.0)
        total = tl.dot(queries, tl.trans(keys), total, input_precision=PRECISION)
    at = (chunk * G + group) * (Q * Q) + i[:, None] * Q + j[None, :]
    tl.store(scores_ptr + at, total.to(scores_ptr.dtype.element_ty))


@triton.jit
def _state_scale(cumulative_ptr, steps_ptr, at, last, FORWARD: tl.constexpr):
    """How much a token adds to the state behind its chunk, or (backward) reads from the one in front."""
    cumulative = tl.load(cumulative_ptr + at)
    if FORWARD:
        return tl.exp2(last - cumulative) * tl.load(steps_ptr + at)
    return tl.exp2(cumulative)


@triton.jit
def state_scale_kernel(cumulative_ptr, steps_ptr, scale_ptr, Q: tl.constexpr, FORWARD: tl.constexpr):
    """`_state_scale` of all tokens, in chunk layout. Grid: (chunks H)."""
    places = tl.program_id(0).to(tl.int64) * Q + tl.arange(0, Q)
    last = tl.load(cumulative_ptr + tl.program_id(0).to(tl.int64) * Q + Q - 1)
    tl.store(scale_ptr + places, _state_scale(cumulative_ptr, steps_ptr, places, last, FORWARD))


@triton.jit
def states_kernel(
    values_ptr, keys_ptr, start_ptr, length_ptr, cumulative_ptr, steps_ptr, states_ptr,
    values_stride, keys_stride,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, FORWARD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """states[c, h] = sum_j scale_j values_j keys_j^T of one or two heads.

    Grid: (N / BLOCK_N, H / HEADS, chunks).
    """
    chunk = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1) * HEADS
    start, length = tl.load(start_ptr + chunk), tl.load(length_ptr + chunk)
    if length == 0:
        return
    channels, columns = tl.arange(0, HEADS * P), tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    base = chunk * (H * Q) + head * Q
    last = tl.load(cumulative_ptr + base + Q - 1)
    second_last = tl.load(cumulative_ptr + base + HEADS * Q - 1)
    values_at = values_ptr + start * values_stride + head * P + channels[None, :]
    keys_at = keys_ptr + start * keys_stride + (head // (H // G)) * N + columns[None, :]
    total = tl.zeros([BLOCK_N, HEADS * P], tl.float32)
    for k in range(0, length, BLOCK_K):
        token = k + tl.arange(0, BLOCK_K)
        inside = (token < length)[:, None]
        values = tl.load(values_at + token[:, None] * values_stride, mask=inside, other=0.0)
        keys = tl.load(keys_at + token[:, None] * keys_stride, mask=inside, other=0.0)
        scale = _state_scale(cumulative_ptr, steps_ptr, base + token, last, FORWARD)[:, None]
        if HEADS == 2:
            second = _state_scale(cumulative_ptr, steps_ptr, base + Q + token, second_last, FORWARD)[:, None]
            scale = tl.where(channels[None, :] < P, scale, second)
        scaled = (values * scale).to(keys.dtype)
        total = tl.dot(tl.trans(keys), scaled, total, input_precision=PRECISION)
    at = (chunk * H + head) * (P * N) + channels[:, None] * N + columns[None, :]
    tl.store(states_ptr + at, tl.trans(total).to(states_ptr.dtype.element_ty))


@triton.jit
def pass_states_kernel(
    states_ptr, cumulative_ptr, first_ptr, initial_ptr, final_ptr,
    H: tl.constexpr, PN: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, HAS_INITIAL: tl.constexpr,
    HAS_FINAL: tl.constexpr,
):  # fmt: skip
    """Turns what each chunk adds into the state in front of it, in place.

    Grid: (P N / BLOCK, H, sequences).
    """
    sequence, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = (sequence * H + head) * PN + element
    if HAS_INITIAL:
        state = tl.load(initial_ptr + own).to(tl.float32)
    else:
        state = tl.zeros([BLOCK], tl.float32)
    end = tl.load(first_ptr + sequence + 1)
    # four loads on their way at a time: a single one would leave the memory idle
    for chunk in range(tl.load(first_ptr + sequence), end, 4):
        row = chunk * H + head
        at = states_ptr + row * PN + element
        ends = cumulative_ptr + row * Q + Q - 1
        has_1, has_2, has_3 = chunk + 1 < end, chunk + 2 < end, chunk + 3 < end
        added_0 = tl.load(at).to(tl.float32)
        added_1 = tl.load(at + H * PN, mask=has_1, other=0.0).to(tl.float32)
        added_2 = tl.load(at + 2 * H * PN, mask=has_2, other=0.0).to(tl.float32)
        added_3 = tl.load(at + 3 * H * PN, mask=has_3, other=0.0).to(tl.float32)
        decay_0 = tl.exp2(tl.load(ends))
        decay_1 = tl.exp2(tl.load(ends + H * Q, mask=has_1, other=0.0))
        decay_2 = tl.exp2(tl.load(ends + 2 * H * Q, mask=has_2, other=0.0))
        decay_3 = tl.exp2(tl.load(ends + 3 * H * Q, mask=has_3, other=0.0))
        tl.store(at, state.to(states_ptr.dtype.element_ty))
        state = state * decay_0 + added_0
        tl.store(at + H * PN, state.to(states_ptr.dtype.element_ty), mask=has_1)
        state = state * decay_1 + added_1
        tl.store(at + 2 * H * PN, state.to(states_ptr.dtype.element_ty), mask=has_2)
        state = state * decay_2 + added_2
        tl.store(at + 3 * H * PN, state.to(states_ptr.dtype.element_ty), mask=has_3)
        state = state * decay_3 + added_3
    if HAS_FINAL:
        tl.store(final_ptr + own, state)


@triton.jit
def march_kernel(
    values, keys, states, scales, fronts_ptr, start_ptr, length_ptr, first_ptr, cumulative_ptr,
    initial_ptr, final_ptr, decay_ptr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, FORWARD: tl.constexpr,
    REGULAR: tl.constexpr, HAS_INITIAL: tl.constexpr, HAS_FINAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each chunk adds and what is passed on in one: walks a sequence with a [P, BLOCK_N] tile of state.

    Forward, states in front of the chunks from x and B. Backward, from the last chunk to the first, gradients
    of the states behind them from dy and C, and, with the states in front at fronts_ptr, this tile's part in
    the gradient of each chunk's total decay, [c, h, N / BLOCK_N, P].
    A large state then passes through memory once, not three times; a small one has too few tiles for a GPU.

    values, keys, states and scales (`state_scale_kernel`) are tensor descriptors (models/ops/descriptors.py),
    since this loop waits for instructions as much as for memory. What a chunk needs once, its total decay and
    the state in front of it, is loaded a chunk ahead. REGULAR: all chunks are full, no row is another
    sequence's. Grid: (N / BLOCK_N, H, sequences).
    """
    sequence, head = tl.program_id(2), tl.program_id(1)
    first, end = tl.load(first_ptr + sequence).to(tl.int32), tl.load(first_ptr + sequence + 1).to(tl.int32)
    begin = tl.load(start_ptr + first, mask=end > first, other=0).to(tl.int32)
    stop = tl.load(start_ptr + end - 1, mask=end > first, other=0).to(tl.int32)
    stop += tl.load(length_ptr + end - 1, mask=end > first, other=0)
    column, group = tl.program_id(0) * BLOCK_N, head // (H // G)
    place = tl.arange(0, BLOCK_K)
    blocks = tl.num_programs(0)
    chunks = end - first
    in_state = column + tl.arange(0, P)[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    own = (sequence.to(tl.int64) * H + head) * (P * N) + in_state
    if HAS_INITIAL:
        state = tl.load(initial_ptr + own).to(tl.float32)
    else:
        state = tl.zeros([P, BLOCK_N], tl.float32)
    cumulative_ptr += (first.to(tl.int64) * H + head) * Q + Q - 1
    if FORWARD:
        last = tl.load(cumulative_ptr, mask=chunks > 0, other=0.0)
    else:
        last = tl.load(cumulative_ptr + (chunks - 1) * (H * Q), mask=chunks > 0, other=0.0)
        fronts_ptr += (first.to(tl.int64) * H + head) * (P * N)
        decay_ptr += ((first.to(tl.int64) * H + head) * blocks + tl.program_id(0)) * P + tl.arange(0, P)
        front_at = fronts_ptr + (chunks - 1).to(tl.int64) * (H * P * N) + in_state
        front = tl.load(front_at, mask=chunks > 0, other=0.0)
    pieces: tl.constexpr = Q // BLOCK_K
    for step in tl.range(0, chunks * pieces, num_stages=STAGES):
        chunk, piece = step // pieces, step % pieces
        if not FORWARD:
            chunk = chunks - 1 - chunk
        token = begin + chunk * Q + piece * BLOCK_K
        row = (first + chunk) * H + head
        added = tl.trans(values.load([token, head * P]))
        key = keys.load([token, group * N + column])
        scale = scales.load([row, piece * BLOCK_K])
        if not REGULAR:
            inside = place < stop - token
            added = tl.where(inside[None, :], added, 0.0)
            key = tl.where(inside[:, None], key, 0.0)
        if piece == 0:
            states.store([row * P, column], state.to(states.dtype))
            decay = tl.exp2(last)
            if FORWARD:
                coming = tl.minimum(chunk + 1, chunks - 1)
            else:
                coming = tl.maximum(chunk - 1, 0)
                # a sum over columns alone: one over the whole tile would cross a barrier
                tl.store(decay_ptr + chunk * (H * blocks * P), tl.sum(state * front, axis=1) * decay)
                front = tl.load(fronts_ptr + coming.to(tl.int64) * (H * P * N) + in_state)
            last = tl.load(cumulative_ptr + coming * (H * Q))
            state *= decay
        # transposed before it is scaled: it then goes from shared memory to registers once, not twice
        scaled = (added * scale).to(key.dtype)
        state = tl.dot(scaled, key, state, input_precision=PRECISION)
    if HAS_FINAL:
        tl.store(final_ptr + own, state)


@triton.jit
def _weights(scores_ptr, i, j, Q: tl.constexpr, FORWARD: tl.constexpr):
    """A tile of scores whose rows are queries (forward) or keys (backward)."""
    if FORWARD:
        return tl.load(scores_ptr + i[:, None] * Q + j[None, :])
    return tl.load(scores_ptr + j[None, :] * Q + i[:, None])


@triton.jit
def _edges(cumulative_ptr, first_row, Q: tl.constexpr, ROWS: tl.constexpr, FORWARD: tl.constexpr):
    """Log decay at the edge between a tile of rows and the other tokens it meets, and decay from there to
    the state."""
    if FORWARD:
        edge = tl.load(cumulative_ptr + first_row - 1, mask=first_row > 0, other=0.0)
        return edge, tl.exp2(edge)
    edge = tl.load(cumulative_ptr + first_row + ROWS - 1)
    return edge, tl.exp2(tl.load(cumulative_ptr + Q - 1) - edge)


@triton.jit
def _diagonal(weights, rows, cumulative, cumulative_ptr, steps_ptr, FORWARD: tl.constexpr):
    """The tile of scores on the diagonal with its decays, zero on the side that comes later in time."""
    other = tl.load(cumulative_ptr + rows)
    if FORWARD:
        causal = rows[:, None] >= rows[None, :]
        decay = tl.exp2(cumulative[:, None] - other[None, :]) * tl.load(steps_ptr + rows)[None, :]
    else:
        causal = rows[None, :] >= rows[:, None]
        decay = tl.exp2(other[None, :] - cumulative[:, None])
    # the other side of the diagonal may hold anything, infinities too: chosen away, not multiplied away
    return tl.where(causal, weights * decay, 0.0)


@triton.jit
def outputs_kernel(
    values_ptr, keys_ptr, states_ptr, scores_ptr, D_ptr, start_ptr, length_ptr, cumulative_ptr, steps_ptr,
    out_ptr, values_stride, keys_stride, out_stride,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, FORWARD: tl.constexpr, HAS_D: tl.constexpr,
    HAS_READS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y from x (forward), or dx from dy: the same sums with the roles of query and key exchanged.

    y_i  = sum_{j <= i} scores_ij decay(j, i] dt_j x_j + decay(start, i] state C_i + D x_i
    dx_j = dt_j (sum_{i >= j} scores_ij decay(j, i] dy_i + decay(j, end] dstate B_j) + D dy_j

    Decays to tokens of other tiles are split at the tile's edge into a factor per row and one per column,
    both at most one: only the tile on the diagonal takes an exponential per element. It is loaded last:
    held from the start, it would not fit the registers of a thread.
    Grid: (Q / ROWS, H, chunks).
    """
    chunk, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    start, length = tl.load(start_ptr + chunk), tl.load(length_ptr + chunk)
    first_row = tl.program_id(0) * ROWS
    if first_row >= length:
        return
    group = head // (H // G)
    rows, channels = first_row + tl.arange(0, ROWS), tl.arange(0, P)[None, :]
    inside = (rows < length)[:, None]
    # 64-bit offsets are added to the pointers once; inside a chunk 32 bits do
    values_ptr += start * values_stride + head * P
    out_ptr += start * out_stride + head * P
    scores_ptr += (chunk * G + group) * (Q * Q)
    cumulative_ptr += chunk * (H * Q) + head * Q
    steps_ptr += chunk * (H * Q) + head * Q
    edge, state_factor = _edges(cumulative_ptr, first_row, Q, ROWS, FORWARD)

    if HAS_READS:  # states_ptr holds, for full chunks, the products of keys and states
        total = tl.load(states_ptr + start * (H * P) + head * P + rows[:, None] * (H * P) + channels)
        total = total.to(tl.float32)
    else:
        keys_at = keys_ptr + start * keys_stride + group * N + rows[:, None] * keys_stride
        states_at = states_ptr + (chunk * H + head) * (P * N) + tl.arange(0, P)[:, None] * N
        total = tl.zeros([ROWS, P], tl.float32)
        for n in range(0, N, BLOCK_N):
            columns = n + tl.arange(0, BLOCK_N)[None, :]
            keys = tl.load(keys_at + columns, mask=inside, other=0.0)
            state = tl.load(states_at + columns)
            total = tl.dot(keys, tl.trans(state), total, input_precision=PRECISION)
    total *= state_factor

    if FORWARD:
        begin, end = 0, first_row
    else:
        begin, end = first_row + ROWS, length
    for k in range(begin, end, BLOCK_K):
        token = k + tl.arange(0, BLOCK_K)
        weights = _weights(scores_ptr, rows, token, Q, FORWARD)
        inside_k = (token < length)[:, None]
        values = tl.load(values_ptr + token[:, None] * values_stride + channels, mask=inside_k, other=0.0)
        other = tl.load(cumulative_ptr + token)
        if FORWARD:
            factor = tl.exp2(edge - other) * tl.load(steps_ptr + token)
        else:
            factor = tl.exp2(other - edge)
        weights = (weights * factor[None, :]).to(values.dtype)
        total = tl.dot(weights, values, total, input_precision=PRECISION)

    values = tl.load(values_ptr + rows[:, None] * values_stride + channels, mask=inside, other=0.0)
    cumulative = tl.load(cumulative_ptr + rows)
    total *= tl.exp2(cumulative - edge if FORWARD else edge - cumulative)[:, None]
    weights = _weights(scores_ptr, rows, rows, Q, FORWARD)
    weights = _diagonal(weights, rows, cumulative, cumulative_ptr, steps_ptr, FORWARD)
    total = tl.dot(weights.to(values.dtype), values, total, input_precision=PRECISION)
    if not FORWARD:
        total *= tl.load(steps_ptr + rows)[:, None]
    if HAS_D:
        total += values * tl.load(D_ptr + head)
    tl.store(out_ptr + rows[:, None] * out_stride + channels, total.to(out_ptr.dtype.element_ty), mask=inside)
