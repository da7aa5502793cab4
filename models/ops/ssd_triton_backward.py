"""Triton kernels that only the backward pass of the SSD operator needs; legend as in the forward file.

The gradient of a log decay needs, for every token t, the sum over all pairs (j, i) with j < t <= i of what j
gives to i. Row sums and column sums come from the same fp32 products, so that pairs on one side of t cancel
in the running sum instead of leaving their rounding behind.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/ssd_triton_backward.py needs triton") from error


@triton.jit
def pass_gradients_kernel(
    gradients_ptr, states_ptr, cumulative_ptr, first_ptr, final_ptr, initial_ptr, decay_ptr,
    H: tl.constexpr, PN: tl.constexpr, Q: tl.constexpr, BLOCK: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_INITIAL: tl.constexpr,
):  # fmt: skip
    """Turns what each chunk asks of the state before it into the gradient of the one behind it, in place.

    Also this block's part in the gradient of each chunk's total decay. Grid: (P N / BLOCK, H, sequences).
    """
    sequence, head = tl.program_id(2).to(tl.int64), tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = (sequence * H + head) * PN + element
    if HAS_FINAL:
        gradient = tl.load(final_ptr + own).to(tl.float32)
    else:
        gradient = tl.zeros([BLOCK], tl.float32)
    first, end = tl.load(first_ptr + sequence), tl.load(first_ptr + sequence + 1)
    blocks = tl.num_programs(0)
    for step in range(0, end - first, 2):
        row = (end - 1 - step) * H + head
        at = row * PN + element
        second = end - 2 - step >= first
        asked_0 = tl.load(gradients_ptr + at).to(tl.float32)
        asked_1 = tl.load(gradients_ptr + at - H * PN, mask=second, other=0.0).to(tl.float32)
        state_0 = tl.load(states_ptr + at).to(tl.float32)
        state_1 = tl.load(states_ptr + at - H * PN, mask=second, other=0.0).to(tl.float32)
        ends = cumulative_ptr + row * Q + Q - 1
        decay_0, decay_1 = tl.exp2(tl.load(ends)), tl.exp2(tl.load(ends - H * Q, mask=second, other=0.0))
        part = decay_ptr + row * blocks + tl.program_id(0)
        tl.store(gradients_ptr + at, gradient.to(gradients_ptr.dtype.element_ty))
        tl.store(part, tl.sum(gradient * state_0) * decay_0)
        gradient = gradient * decay_0 + asked_0
        tl.store(gradients_ptr + at - H * PN, gradient.to(gradients_ptr.dtype.element_ty), mask=second)
        tl.store(part - H * blocks, tl.sum(gradient * state_1) * decay_1, mask=second)
        gradient = gradient * decay_1 + asked_1
    if HAS_INITIAL:
        tl.store(initial_ptr + own, gradient)


@triton.jit
def score_gradients_kernel(
    x, dy, scores, dscores, start_ptr, length_ptr, cumulative_ptr, steps_ptr, row_sums_ptr, column_sums_ptr,
    dD_ptr,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, DIAGONAL: tl.constexpr, REGULAR: tl.constexpr, HAS_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of the scores, summed over the heads of a group, in tiles that touch j <= i.

    With pair_ij = (dy_i . x_j) decay(j, i] of one head: dscores_ij = sum over heads of pair_ij dt_j;
    row_sums[c, h, tile of j, i] = sum_j pair_ij scores_ij dt_j,
    column_sums[c, h, tile of i, j] = sum_i pair_ij scores_ij; dD[c, h, i] = dy_i . x_i.
    x, dy, scores, dscores are tensor descriptors (models/ops/descriptors.py). REGULAR: all chunks are full.
    Grid: (Q / ROWS, G, chunks) for the tiles on the diagonal, ((Q / ROWS)^2, G, chunks) for the others.
    """
    tiles: tl.constexpr = Q // ROWS
    chunk, group = tl.program_id(2), tl.program_id(1)
    if DIAGONAL:
        tile_i = tl.program_id(0)
        tile_j = tile_i
    else:
        tile_i, tile_j = tl.program_id(0) // tiles, tl.program_id(0) % tiles
        if tile_j >= tile_i:
            return
    start, length = tl.load(start_ptr + chunk).to(tl.int32), tl.load(length_ptr + chunk)
    if length == 0:
        return
    i, j = tile_i * ROWS + tl.arange(0, ROWS), tile_j * ROWS + tl.arange(0, ROWS)
    causal = i[:, None] >= j[None, :]
    inside = (i < length)[:, None] & (j < length)[None, :]
    tile = (chunk * G + group) * Q + tile_i * ROWS
    score = scores.load([tile, tile_j * ROWS]).to(tl.float32)
    if DIAGONAL:
        score = tl.where(causal, score, 0.0)
    # 64-bit offsets are added to the pointers once; inside the loop 32 bits do
    first = group * (H // G)
    in_chunk = (chunk.to(tl.int64) * H + first) * Q
    cumulative_ptr += in_chunk
    steps_ptr += in_chunk
    if HAS_D:
        dD_ptr += in_chunk
    column_sums_ptr += in_chunk * tiles + tile_i * Q
    row_sums_ptr += in_chunk * tiles + tile_j * Q
    total = tl.zeros([ROWS, ROWS], tl.float32)
    # with its stages named, a loop has all loads of the next heads on their way, not only the matrices'
    for head in tl.range(0, H // G, num_stages=STAGES):
        x_j = x.load([start + tile_j * ROWS, (first + head) * P])
        dy_i = dy.load([start + tile_i * ROWS, (first + head) * P])
        cumulative_i = tl.load(cumulative_ptr + head * Q + i)
        cumulative_j = tl.load(cumulative_ptr + head * Q + j)
        steps = tl.load(steps_ptr + head * Q + j)
        pair = tl.dot(dy_i, tl.trans(x_j), input_precision=PRECISION)
        if not REGULAR:  # rows of another sequence may hold anything
            pair = tl.where(inside, pair, 0.0)
        if DIAGONAL:
            if HAS_D:
                own = tl.where(i[:, None] == j[None, :], pair, 0.0)
                tl.store(dD_ptr + head * Q + i, tl.sum(own, axis=1))
            pair = tl.where(causal, pair * tl.exp2(cumulative_i[:, None] - cumulative_j[None, :]), 0.0)
        else:
            edge = tl.load(cumulative_ptr + head * Q + tile_i * ROWS - 1)
            pair = pair * tl.exp2(cumulative_i - edge)[:, None] * tl.exp2(edge - cumulative_j)[None, :]
        total += pair * steps[None, :]
        pair *= score
        tl.store(column_sums_ptr + head * (tiles * Q) + j, tl.sum(pair, axis=0))
        tl.store(row_sums_ptr + head * (tiles * Q) + i, tl.sum(pair * steps[None, :], axis=1))
    dscores.store([tile, tile_j * ROWS], total.to(dscores.dtype))


@triton.jit
def key_gradients_kernel(
    values_ptr, keys_ptr, others_ptr, states_ptr, dscores_ptr, start_ptr, length_ptr, cumulative_ptr,
    steps_ptr, out_ptr, sums_ptr, values_stride, keys_stride, others_stride, out_stride,
    H: tl.constexpr, G: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr, QUERIES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dC (QUERIES) or dB, summed over the heads of a group.

    dC_i = sum_heads decay(start, i] dy_i state + sum_j dscores_ij B_j           values dy, keys C, others B
    dB_j = sum_heads dt_j decay(j, end] x_j state + sum_i dscores_ij C_i         values x, keys B, others C
    with the state in front of the chunk, or the gradient of the one behind it. sums[block of N, c, h, token]
    is the first term of one head times the key, without dt. Grid: (Q / ROWS, N / BLOCK_N, chunks * G).
    """
    chunk, group = (tl.program_id(2) // G).to(tl.int64), tl.program_id(2) % G
    start, length = tl.load(start_ptr + chunk), tl.load(length_ptr + chunk)
    first_row = tl.program_id(0) * ROWS
    if first_row >= length:
        return
    rows, channels = first_row + tl.arange(0, ROWS), tl.arange(0, P)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < length)[:, None]
    keys_at = keys_ptr + start * keys_stride + group * N + rows[:, None] * keys_stride + columns[None, :]
    keys = tl.load(keys_at, mask=inside, other=0.0).to(tl.float32)
    first = group * (H // G)
    values_ptr += start * values_stride + first * P
    states_ptr += (chunk * H + first) * (P * N)
    cumulative_ptr += (chunk * H + first) * Q
    steps_ptr += (chunk * H + first) * Q
    chunks = tl.num_programs(2) // G
    sums_ptr += (tl.program_id(1) * chunks.to(tl.int64) + chunk) * (H * Q) + first * Q
    in_values = rows[:, None] * values_stride + channels[None, :]
    in_state = channels[:, None] * N + columns[None, :]
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for head in tl.range(0, H // G, num_stages=STAGES):
        values = tl.load(values_ptr + head * P + in_values, mask=inside, other=0.0)
        state = tl.load(states_ptr + head * (P * N) + in_state)
        cumulative = tl.load(cumulative_ptr + head * Q + rows)
        read = tl.dot(values, state, input_precision=PRECISION)
        if QUERIES:
            decay = tl.exp2(cumulative)
            scale = decay
        else:
            decay = tl.exp2(tl.load(cumulative_ptr + head * Q + Q - 1) - cumulative)
            scale = decay * tl.load(steps_ptr + head * Q + rows)
        tl.store(sums_ptr + head * Q + rows, tl.sum(read * keys, axis=1) * decay)
        total += read * scale[:, None]

    others_at = others_ptr + start * others_stride + group * N + columns[None, :]
    dscores_at = dscores_ptr + (chunk * G + group) * (Q * Q)
    begin = 0 if QUERIES else first_row
    end = first_row + ROWS if QUERIES else length
    for k in range(begin, end, BLOCK_K):
        token = k + tl.arange(0, BLOCK_K)
        if QUERIES:
            causal = rows[:, None] >= token[None, :]
            weights = tl.load(dscores_at + rows[:, None] * Q + token[None, :], mask=causal, other=0.0)
        else:
            causal = token[None, :] >= rows[:, None]
            weights = tl.load(dscores_at + token[None, :] * Q + rows[:, None], mask=causal, other=0.0)
        others = tl.load(
            others_at + token[:, None] * others_stride, mask=(token < length)[:, None], other=0.0
        )
        total = tl.dot(weights.to(others.dtype), others, total, input_precision=PRECISION)
    at = out_ptr + (start + rows)[:, None] * out_stride + group * N + columns[None, :]
    tl.store(at, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def step_gradients_kernel(
    A_ptr, start_ptr, length_ptr, steps_ptr, row_sums_ptr, column_sums_ptr, read_sums_ptr, added_sums_ptr,
    decay_ptr, ddt_ptr, dA_ptr,
    H: tl.constexpr, Q: tl.constexpr, HEADS: tl.constexpr, TILES: tl.constexpr, N_BLOCKS: tl.constexpr,
    DECAY_BLOCKS: tl.constexpr,
):  # fmt: skip
    """ddt, and each chunk's part of dA, from the sums of the other kernels. Grid: (H / HEADS, chunks).

    The gradient of the log decay of a token sums over all places at or behind it: places run backwards here.
    """
    chunk, chunks = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    start, length = tl.load(start_ptr + chunk), tl.load(length_ptr + chunk)
    places = Q - 1 - tl.arange(0, Q)
    known = (heads < H)[:, None] & (places < length)[None, :]
    rows = tl.zeros([HEADS, Q], tl.float32)
    columns = tl.zeros([HEADS, Q], tl.float32)
    sums_at = (chunk * H + heads)[:, None] * (TILES * Q) + places[None, :]
    tile = (places // (Q // TILES))[None, :]
    for t in tl.static_range(TILES):
        rows += tl.load(row_sums_ptr + sums_at + t * Q, mask=known & (tile >= t), other=0.0)
        columns += tl.load(column_sums_ptr + sums_at + t * Q, mask=known & (tile <= t), other=0.0)
    added = tl.zeros([HEADS, Q], tl.float32)
    at = (chunk * H + heads)[:, None] * Q + places[None, :]
    for n in tl.static_range(N_BLOCKS):
        block = n * (chunks.to(tl.int64) * (H * Q))
        rows += tl.load(read_sums_ptr + block + at, mask=known, other=0.0)
        added += tl.load(added_sums_ptr + block + at, mask=known, other=0.0)
    steps = tl.load(steps_ptr + at, mask=known, other=0.0)
    decay_at = decay_ptr + (chunk * H + heads)[:, None] * DECAY_BLOCKS + tl.arange(0, DECAY_BLOCKS)[None, :]
    whole = tl.sum(tl.load(decay_at, mask=(heads < H)[:, None] & (length > 0), other=0.0), axis=1)
    # a log decay at t scales what places before t add to the state: all of it less that from t on
    total_added = tl.sum(added * steps, axis=1)
    behind = tl.cumsum(rows - (columns + added) * steps, axis=1)
    gradient = behind + (whole + total_added)[:, None]
    gradient = tl.where(known, gradient, 0.0)
    rate = tl.load(A_ptr + heads, mask=heads < H, other=0.0)
    ddt = gradient * rate[:, None] + columns + added
    tl.store(ddt_ptr + (start + places)[None, :] * H + heads[:, None], ddt, mask=known)
    tl.store(dA_ptr + chunk * H + heads, tl.sum(gradient * steps, axis=1), mask=heads < H)
