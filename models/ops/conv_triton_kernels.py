"""Triton kernels of the causal convolution; `models/ops/conv_triton.py` launches them.

A program marches along time with a slice of the channels and keeps the last inputs in registers, so that
every input is read once, in vectors along the channels. Inputs may be a slice of a wider projection: only
the channel axis must be contiguous. The backward repeats the convolution on the inputs that it reads anyway:
nothing but the inputs is kept. It delays dx by three tokens, until all that a token feeds has been seen.

Legend: `past`, how many tokens of its sequence lie before a token; w1 the weight of the input one token back;
p1, p2, p3 the inputs one, two and three tokens back.
"""

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("models/ops/conv_triton_kernels.py needs triton") from error


@triton.jit
def _weight(weight_ptr, channel, known, BACK: tl.constexpr, W: tl.constexpr):
    """The weight of the input BACK tokens ago, zero beyond the width."""
    if BACK < W:
        return tl.load(weight_ptr + channel * W + (W - 1 - BACK), mask=known, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _bias(bias_ptr, channel, known, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return tl.load(bias_ptr + channel, mask=known, other=0.0).to(tl.float32)
    else:
        return tl.zeros(channel.shape, tl.float32)


@triton.jit
def _raw(row_ptr, token, stride, channel, known, length):
    """One token's slice of channels, zero outside the row."""
    mask = known & (token >= 0) & (token < length)
    return tl.load(row_ptr + token * stride + channel, mask=mask, other=0.0)


@triton.jit
def _row(row_ptr, token, stride, channel, known, length):
    return _raw(row_ptr, token, stride, channel, known, length).to(tl.float32)


@triton.jit
def _before(previous, initial_ptr, past, sequence, channel, known, D, BACK: tl.constexpr, W: tl.constexpr,
            HAS_INITIAL: tl.constexpr):  # fmt: skip
    """The input BACK tokens ago: `previous`, unless that lies before the sequence: initial state or zero."""
    if BACK >= W:
        return previous
    elif HAS_INITIAL:
        at = initial_ptr + (sequence * D + channel) * (W - 1) + (past - BACK + W - 1)
        initial = tl.load(at, mask=known & (past < BACK), other=0.0).to(tl.float32)
        return tl.where(past < BACK, initial, previous)
    else:
        return tl.where(past < BACK, 0.0, previous)


@triton.jit
def _history(row_ptr, initial_ptr, first, stride, sequence, channel, known, length, D, BACK: tl.constexpr,
             W: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr):  # fmt: skip
    """The input BACK tokens before a program's first; tokens of packed rows check their bounds."""
    previous = _row(row_ptr, first - BACK, stride, channel, known, length)
    if PACKED:
        return previous
    else:
        return _before(previous, initial_ptr, first, sequence, channel, known, D, BACK, W, HAS_INITIAL)


@triton.jit
def _bounds(past_ptr, sequence_ptr, token, length, sequence, PACKED: tl.constexpr):
    """Past and sequence of one token; rows that are sequences have no bounds inside."""
    if PACKED:
        past = tl.load(past_ptr + token, mask=token < length, other=3)
        return past, tl.load(sequence_ptr + token, mask=token < length, other=0)
    else:
        return 3, sequence


@triton.jit
def _convolve(x, p1, p2, p3, w0, w1, w2, w3, bias, W: tl.constexpr):
    """All W products; a width below four leaves the last ones out."""
    total = bias + w0 * x + w1 * p1
    if W > 2:
        total += w2 * p2
    if W > 3:
        total += w3 * p3
    return total


@triton.jit
def _forward_token(
    x, p1, p2, p3, w0, w1, w2, w3, bias, y_ptr, initial_ptr, past_ptr, sequence_ptr, token, length, sequence,
    channel, known, D, W: tl.constexpr, SILU: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    if PACKED:
        past, sequence = _bounds(past_ptr, sequence_ptr, token, length, sequence, PACKED)
        p1 = _before(p1, initial_ptr, past, sequence, channel, known, D, 1, W, HAS_INITIAL)
        p2 = _before(p2, initial_ptr, past, sequence, channel, known, D, 2, W, HAS_INITIAL)
        p3 = _before(p3, initial_ptr, past, sequence, channel, known, D, 3, W, HAS_INITIAL)
    total = _convolve(x, p1, p2, p3, w0, w1, w2, w3, bias, W)
    if SILU:
        total = tl.fdiv(total, 1 + tl.exp(-total))
    tl.store(y_ptr + token * D + channel, total.to(y_ptr.dtype.element_ty), mask=known & (token < length))


@triton.jit
def forward_kernel(
    x_ptr, weight_ptr, bias_ptr, initial_ptr, past_ptr, sequence_ptr, y_ptr, length, D, x_stride,
    W: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Grid: (D / BLOCK, length / TOKENS, rows)."""
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = channel < D
    x_ptr += row * length * x_stride
    y_ptr += row * length * D
    w0, w1 = _weight(weight_ptr, channel, known, 0, W), _weight(weight_ptr, channel, known, 1, W)
    w2, w3 = _weight(weight_ptr, channel, known, 2, W), _weight(weight_ptr, channel, known, 3, W)
    bias = _bias(bias_ptr, channel, known, HAS_BIAS)
    p1 = _history(
        x_ptr, initial_ptr, first, x_stride, row, channel, known, length, D, 1, W, HAS_INITIAL, PACKED
    )
    p2 = _history(
        x_ptr, initial_ptr, first, x_stride, row, channel, known, length, D, 2, W, HAS_INITIAL, PACKED
    )
    p3 = _history(
        x_ptr, initial_ptr, first, x_stride, row, channel, known, length, D, 3, W, HAS_INITIAL, PACKED
    )
    for step in range(0, TOKENS, 4):
        token = first + step
        # four rows on their way at a time: a single one would leave the memory idle
        x0 = _row(x_ptr, token, x_stride, channel, known, length)
        x1 = _row(x_ptr, token + 1, x_stride, channel, known, length)
        x2 = _row(x_ptr, token + 2, x_stride, channel, known, length)
        x3 = _row(x_ptr, token + 3, x_stride, channel, known, length)
        _forward_token(x0, p1, p2, p3, w0, w1, w2, w3, bias, y_ptr, initial_ptr, past_ptr, sequence_ptr,
                       token, length, row, channel, known, D, W, SILU, HAS_INITIAL, PACKED)  # fmt: skip
        _forward_token(x1, x0, p1, p2, w0, w1, w2, w3, bias, y_ptr, initial_ptr, past_ptr, sequence_ptr,
                       token + 1, length, row, channel, known, D, W, SILU, HAS_INITIAL, PACKED)  # fmt: skip
        _forward_token(x2, x1, x0, p1, w0, w1, w2, w3, bias, y_ptr, initial_ptr, past_ptr, sequence_ptr,
                       token + 2, length, row, channel, known, D, W, SILU, HAS_INITIAL, PACKED)  # fmt: skip
        _forward_token(x3, x2, x1, x0, w0, w1, w2, w3, bias, y_ptr, initial_ptr, past_ptr, sequence_ptr,
                       token + 3, length, row, channel, known, D, W, SILU, HAS_INITIAL, PACKED)  # fmt: skip
        p1, p2, p3 = x3, x2, x1


@triton.jit
def _silu_gradient(dy, value):
    sigmoid = tl.sigmoid(value)
    return dy * sigmoid * (1 + value * (1 - sigmoid))


@triton.jit
def _backward_token(
    dy, x, p1, p2, p3, d1, d2, d3, s0, s1, s2, s3, sb, w0, w1, w2, w3, bias, dx_ptr, initial_ptr, past_ptr,
    sequence_ptr, token, first, length, sequence, channel, known, D, dx_stride,
    W: tl.constexpr, SILU: tl.constexpr, HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    """Adds a token's gradient to dx one, two and three tokens back (d1, d2, d3) and, if OWN, to the sums."""
    past, sequence = _bounds(past_ptr, sequence_ptr, token, length, sequence, PACKED)
    if PACKED:
        p1 = _before(p1, initial_ptr, past, sequence, channel, known, D, 1, W, HAS_INITIAL)
        p2 = _before(p2, initial_ptr, past, sequence, channel, known, D, 2, W, HAS_INITIAL)
        p3 = _before(p3, initial_ptr, past, sequence, channel, known, D, 3, W, HAS_INITIAL)
    gradient = dy
    if SILU:
        gradient = _silu_gradient(dy, _convolve(x, p1, p2, p3, w0, w1, w2, w3, bias, W))
    back_1, back_2, back_3 = w1 * gradient, w2 * gradient, w3 * gradient
    if PACKED:
        back_1 = tl.where(past >= 1, back_1, 0.0)
        back_2 = tl.where(past >= 2, back_2, 0.0)
        back_3 = tl.where(past >= 3, back_3, 0.0)
    ready = token - 3
    mask = known & (ready >= first) & (ready < length)
    tl.store(dx_ptr + ready * dx_stride + channel, (d3 + back_3).to(dx_ptr.dtype.element_ty), mask=mask)
    if OWN:
        s0 += gradient * x
        s1 += gradient * p1
        s2 += gradient * p2
        s3 += gradient * p3
        sb += gradient
    return w0 * gradient, d1 + back_1, d2 + back_2, s0, s1, s2, s3, sb


@triton.jit
def backward_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, past_ptr, sequence_ptr, dx_ptr, dweight_ptr,
    length, D, x_stride, dy_stride, dx_stride,
    W: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_INITIAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """dx, and this program's part of dweight and dbias: `[programs, W + 1, D]`, the last row dbias.

    Grid: (D / BLOCK, length / TOKENS, rows).
    """
    row = tl.program_id(2).to(tl.int64)
    first = tl.program_id(1).to(tl.int64) * TOKENS
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = channel < D
    x_ptr += row * length * x_stride
    dy_ptr += row * length * dy_stride
    dx_ptr += row * length * dx_stride
    w0, w1 = _weight(weight_ptr, channel, known, 0, W), _weight(weight_ptr, channel, known, 1, W)
    w2, w3 = _weight(weight_ptr, channel, known, 2, W), _weight(weight_ptr, channel, known, 3, W)
    bias = _bias(bias_ptr, channel, known, HAS_BIAS)
    p1 = _history(
        x_ptr, initial_ptr, first, x_stride, row, channel, known, length, D, 1, W, HAS_INITIAL, PACKED
    )
    p2 = _history(
        x_ptr, initial_ptr, first, x_stride, row, channel, known, length, D, 2, W, HAS_INITIAL, PACKED
    )
    p3 = _history(
        x_ptr, initial_ptr, first, x_stride, row, channel, known, length, D, 3, W, HAS_INITIAL, PACKED
    )
    zero = tl.zeros([BLOCK], tl.float32)
    d1, d2, d3 = zero, zero, zero
    s0, s1, s2, s3, sb = zero, zero, zero, zero, zero
    x0 = _raw(x_ptr, first, x_stride, channel, known, length)
    x1 = _raw(x_ptr, first + 1, x_stride, channel, known, length)
    dy0 = _raw(dy_ptr, first, dy_stride, channel, known, length)
    dy1 = _raw(dy_ptr, first + 1, dy_stride, channel, known, length)
    for step in range(0, TOKENS, 2):
        token = first + step
        # the next two tokens are on their way while these two are computed
        next_x0 = _raw(x_ptr, token + 2, x_stride, channel, known, length)
        next_x1 = _raw(x_ptr, token + 3, x_stride, channel, known, length)
        next_dy0 = _raw(dy_ptr, token + 2, dy_stride, channel, known, length)
        next_dy1 = _raw(dy_ptr, token + 3, dy_stride, channel, known, length)
        now_x0, now_x1 = x0.to(tl.float32), x1.to(tl.float32)
        d1, d2, d3, s0, s1, s2, s3, sb = _backward_token(
            dy0.to(tl.float32), now_x0, p1, p2, p3, d1, d2, d3, s0, s1, s2, s3, sb, w0, w1, w2, w3, bias,
            dx_ptr, initial_ptr, past_ptr, sequence_ptr, token, first, length, row, channel, known, D,
            dx_stride, W, SILU, HAS_INITIAL, PACKED, True,
        )  # fmt: skip
        d1, d2, d3, s0, s1, s2, s3, sb = _backward_token(
            dy1.to(tl.float32), now_x1, now_x0, p1, p2, d1, d2, d3, s0, s1, s2, s3, sb, w0, w1, w2, w3, bias,
            dx_ptr, initial_ptr, past_ptr, sequence_ptr, token + 1, first, length, row, channel, known, D,
            dx_stride, W, SILU, HAS_INITIAL, PACKED, True,
        )  # fmt: skip
        p1, p2, p3 = now_x1, now_x0, p1
        x0, x1, dy0, dy1 = next_x0, next_x1, next_dy0, next_dy1
    for ahead in tl.static_range(3):  # tokens of the next program that this one's last inputs feed
        token = first + TOKENS + ahead
        x = _row(x_ptr, token, x_stride, channel, known, length)
        dy = _row(dy_ptr, token, dy_stride, channel, known, length)
        d1, d2, d3, s0, s1, s2, s3, sb = _backward_token(
            dy, x, p1, p2, p3, d1, d2, d3, s0, s1, s2, s3, sb, w0, w1, w2, w3, bias, dx_ptr, initial_ptr,
            past_ptr, sequence_ptr, token, first, length, row, channel, known, D,
            dx_stride, W, SILU, HAS_INITIAL, PACKED, False,
        )  # fmt: skip
        p1, p2, p3 = x, p1, p2
    part = dweight_ptr + (row * tl.num_programs(1) + tl.program_id(1)) * ((W + 1) * D) + channel
    tl.store(part + (W - 1) * D, s0, mask=known)
    tl.store(part + (W - 2) * D, s1, mask=known)
    if W > 2:
        tl.store(part + (W - 3) * D, s2, mask=known)
    if W > 3:
        tl.store(part + (W - 4) * D, s3, mask=known)
    tl.store(part + W * D, sb, mask=known)


@triton.jit
def initial_gradient_kernel(
    dy_ptr, x_ptr, weight_ptr, bias_ptr, initial_ptr, offsets_ptr, dinitial_ptr, D, x_stride, dy_stride,
    W: tl.constexpr, BLOCK: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Gradient of the initial states, which only the first W - 1 tokens see. Grid: (D / BLOCK, sequences)."""
    number = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = channel < D
    begin, end = tl.load(offsets_ptr + number), tl.load(offsets_ptr + number + 1)
    w0, w1 = _weight(weight_ptr, channel, known, 0, W), _weight(weight_ptr, channel, known, 1, W)
    w2, w3 = _weight(weight_ptr, channel, known, 2, W), _weight(weight_ptr, channel, known, 3, W)
    bias = _bias(bias_ptr, channel, known, HAS_BIAS)
    zero = tl.zeros([BLOCK], tl.float32)
    p1 = _before(zero, initial_ptr, 0, number, channel, known, D, 1, W, True)
    p2 = _before(zero, initial_ptr, 0, number, channel, known, D, 2, W, True)
    p3 = _before(zero, initial_ptr, 0, number, channel, known, D, 3, W, True)
    d1, d2, d3 = zero, zero, zero
    for past in tl.static_range(W - 1):
        x = _row(x_ptr, begin + past, x_stride, channel, known, end)
        gradient = _row(dy_ptr, begin + past, dy_stride, channel, known, end)
        if SILU:
            gradient = _silu_gradient(gradient, _convolve(x, p1, p2, p3, w0, w1, w2, w3, bias, W))
        # d1, d2, d3: the inputs one, two and three tokens before the sequence
        if past == 0:
            d1, d2, d3 = w1 * gradient, w2 * gradient, w3 * gradient
        if past == 1:
            d1, d2 = d1 + w2 * gradient, d2 + w3 * gradient
        if past == 2:
            d1 += w3 * gradient
        p1, p2, p3 = x, p1, p2
    out = dinitial_ptr + (number * D + channel) * (W - 1)
    tl.store(out + W - 2, d1, mask=known)
    if W > 2:
        tl.store(out + W - 3, d2, mask=known)
    if W > 3:
        tl.store(out, d3, mask=known)
