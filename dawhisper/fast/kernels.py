"""The token step's arithmetic as Triton kernels, for a GPU in half precision; token_step.py calls them.

A step has few rows and must read every weight, key and value once. As PyTorch calls it is thirty short kernels a layer,
most of whose time is their beginning and end; here it is twelve, and each is launched before the one before has ended.

Shapes: R = B * G rows of tokens (G rows share a window's audio), d width, h heads of width e, T audio positions, H = h
or, where both branches' heads are stacked, 2h. Scores are in base 2, since that is what the GPU exponentiates.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # a score of nothing


@triton.jit
def _follow(EARLY: tl.constexpr):
    # wait for what the kernels before have written
    if EARLY:
        gdc_wait()


@triton.jit
def _release(EARLY: tl.constexpr):
    # let the next kernel be launched; earlier, it would take the place of this one's last programs
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def _normed(x, d, w_ptr, b_ptr, EPS, D: tl.constexpr):
    # layer norm of a row, zero beyond D
    mean = tl.sum(x, 0) / D
    centred = tl.where(d < D, x - mean, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, 0) / D + EPS)
    w = tl.load(w_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    return centred * scale * w + tl.load(b_ptr + d, mask=d < D, other=0.0).to(tl.float32)


@triton.jit
def _gelu(x):
    return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def norm(x_ptr, w_ptr, b_ptr, y_ptr, EPS, D: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    _follow(EARLY)
    at, d = tl.program_id(0) * D, tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + d, mask=d < D, other=0.0).to(tl.float32)
    y = _normed(x, d, w_ptr, b_ptr, EPS, D)
    _release(EARLY)
    tl.store(y_ptr + at + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


@triton.jit
def linear(
    x_ptr, w_ptr, b_ptr, residual_ptr, y_ptr, M, N, x_batch, x_row,
    K: tl.constexpr, BIAS: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    # K is summed in PARTS sums, one for each warp: in one sum every product would wait for the one before
    _follow(EARLY)
    batch = tl.program_id(2)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, PARTS)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    x_at = x_ptr + batch * x_batch + m[None, :, None] * x_row + k[:, None, :]
    w_at = w_ptr + (batch * N + n[None, :, None]).to(tl.int64) * K + k[:, None, :]
    in_m, in_n = m[None, :, None] < M, n[None, :, None] < N
    sums = tl.zeros([PARTS, BLOCK_M, BLOCK_N], tl.float32)
    for start in tl.range(0, K, PARTS * BLOCK_K):
        in_k = start + k[:, None, :] < K
        w = tl.load(w_at + start, mask=in_n & in_k, other=0.0)
        x = tl.load(x_at + start, mask=in_m & in_k, other=0.0)
        sums = tl.dot(x, tl.permute(w, (0, 2, 1)), sums, input_precision="ieee")
    _release(EARLY)
    y = tl.sum(sums, 0)
    if BIAS:
        y += tl.load(b_ptr + batch * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        y = _gelu(y)
    at = (batch * M + m[:, None]).to(tl.int64) * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    if RESIDUAL:
        y += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _attended(highest, total, read, scores, value):
    # Attention so far, each lane's own: the highest score, the sum of weights, and of weighted values, under it.
    higher = tl.maximum(highest, scores)
    weight, fade = tl.exp2(scores - higher), tl.exp2(highest - higher)
    return higher, total * fade + weight, read * fade[:, None] + weight[:, None] * value


@triton.jit
def _over_lanes(highest, total, read):
    top = tl.max(highest, 0)
    weight = tl.exp2(highest - top)
    return top, tl.sum(total * weight, 0), tl.sum(read * weight[:, None], 0)


@triton.jit
def self_attend(
    qkv_ptr, keys_ptr, values_ptr, position_ptr, y_ptr, scale, H, CTX,
    E: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _follow(EARLY)
    row, head = tl.program_id(0), tl.program_id(1)
    e, t = tl.arange(0, E), tl.arange(0, BLOCK)
    position = tl.load(position_ptr).to(tl.int32)
    mine = qkv_ptr + row * 3 * H * E + head * E + e
    q = tl.load(mine).to(tl.float32) * (scale * LOG2E)
    new_key, new_value = tl.load(mine + H * E), tl.load(mine + 2 * H * E)
    cache = ((row * H + head) * CTX).to(tl.int64) * E + e
    tl.store(keys_ptr + cache + position * E, new_key)
    tl.store(values_ptr + cache + position * E, new_value)
    # what was written just now is not read again: the new position is where the sums begin, in the first lane
    first = t == 0
    highest = tl.where(first, tl.sum(q * new_key.to(tl.float32), 0), LOWEST)
    total = tl.where(first, 1.0, 0.0)
    read = tl.where(first[:, None], new_value.to(tl.float32)[None, :], 0.0)
    for start in tl.range(0, SPAN, BLOCK, num_stages=2):
        earlier = start + t < position
        at, inside = cache[None, :] + (start + t[:, None]) * E, start + t[:, None] < SPAN
        # all inside, not what is earlier, so that these do not wait for the position
        key = tl.load(keys_ptr + at, mask=inside, other=0.0).to(tl.float32)
        value = tl.load(values_ptr + at, mask=inside, other=0.0).to(tl.float32)
        scores = tl.where(earlier, tl.sum(key * q[None, :], 1), LOWEST)
        value = tl.where(earlier[:, None], value, 0.0)
        highest, total, read = _attended(highest, total, read, scores, value)
    _release(EARLY)
    highest, total, read = _over_lanes(highest, total, read)
    tl.store(y_ptr + row * H * E + head * E + e, (read / total).to(y_ptr.dtype.element_ty))


@triton.jit
def cross_attend(
    q_ptr, key_ptr, value_ptr, scales_ptr, part_ptr, level_ptr, scale, q_row, H, T,
    E: tl.constexpr, INT8: tl.constexpr, PER_SPLIT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    # one row a window: sums, which need no tiles of rows
    _follow(EARLY)
    window_head, split = tl.program_id(0), tl.program_id(1)
    window, head = window_head // H, window_head % H
    e, t = tl.arange(0, E), split * PER_SPLIT + tl.arange(0, BLOCK)
    q = tl.load(q_ptr + window * q_row + head * E + e).to(tl.float32) * (scale * LOG2E)
    if INT8:
        q = q * tl.load(scales_ptr + window_head * 2 * E + e)
    audio = window_head.to(tl.int64) * T * E + e
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    read = tl.zeros([BLOCK, E], tl.float32)
    end = tl.minimum((split + 1) * PER_SPLIT, T)
    for start in tl.range(0, PER_SPLIT, BLOCK, num_stages=3):  # only when asked are loads made ahead
        inside = start + t < end
        at = audio[None, :] + (start + t[:, None]) * E
        key = tl.load(key_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
        value = tl.load(value_ptr + at, mask=inside[:, None], other=0.0).to(tl.float32)
        scores = tl.where(inside, tl.sum(key * q[None, :], 1), LOWEST)
        highest, total, read = _attended(highest, total, read, scores, value)
    _release(EARLY)
    highest, total, read = _over_lanes(highest, total, read)
    if INT8:
        read = read * tl.load(scales_ptr + window_head * 2 * E + E + e)
    place = window_head * tl.num_programs(1) + split
    tl.store(part_ptr + place * E + e, read / total)
    tl.store(level_ptr + place, highest + tl.log2(total))


@triton.jit
def cross_attend_rows(
    q_ptr, key_ptr, value_ptr, scales_ptr, part_ptr, level_ptr, scale, q_row, H, T, G,
    E: tl.constexpr, INT8: tl.constexpr, PER_SPLIT: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_G: tl.constexpr,
):  # fmt: skip
    # several rows a window, as tiles of matrix products
    _follow(EARLY)
    window_head, split = tl.program_id(0), tl.program_id(1)
    window, head = window_head // H, window_head % H
    g = tl.program_id(2) * BLOCK_G + tl.arange(0, BLOCK_G)
    e, t = tl.arange(0, E), split * PER_SPLIT + tl.arange(0, BLOCK)
    q = tl.load(q_ptr + (window * G + g[:, None]) * q_row + head * E + e, mask=g[:, None] < G, other=0.0)
    half = q.dtype
    q = q.to(tl.float32) * (scale * LOG2E)
    if INT8:
        q = q * tl.load(scales_ptr + window_head * 2 * E + e)[None, :]
    q = q.to(half)
    audio = window_head.to(tl.int64) * T * E + e
    highest = tl.full([BLOCK_G], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    read = tl.zeros([BLOCK_G, E], tl.float32)
    end = tl.minimum((split + 1) * PER_SPLIT, T)
    for start in tl.range(0, PER_SPLIT, BLOCK, num_stages=3):  # only when asked are loads made ahead
        inside = start + t < end
        at = audio[None, :] + (start + t[:, None]) * E
        key = tl.load(key_ptr + at, mask=inside[:, None], other=0.0).to(half)
        value = tl.load(value_ptr + at, mask=inside[:, None], other=0.0).to(half)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee")
        scores = tl.where(inside[None, :], scores, LOWEST)
        higher = tl.maximum(highest, tl.max(scores, 1))
        weight, fade = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
        total = total * fade + tl.sum(weight, 1)
        read = read * fade[:, None] + tl.dot(weight.to(half), value, input_precision="ieee")
        highest = higher
    _release(EARLY)
    if INT8:
        read = read * tl.load(scales_ptr + window_head * 2 * E + E + e)[None, :]
    place = (window_head * tl.num_programs(1) + split) * G + g
    tl.store(part_ptr + place[:, None] * E + e, read / total[:, None], mask=g[:, None] < G)
    tl.store(level_ptr + place, highest + tl.log2(total), mask=g < G)


@triton.jit
def join(
    q_ptr, part_ptr, level_ptr, noise_key_ptr, noise_value_ptr, noise_scale_ptr, y_ptr, scale, q_row, H, R, G,
    N_NOISE, HEADS: tl.constexpr, E: tl.constexpr, SPLITS: tl.constexpr, NOISE: tl.constexpr, BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    _follow(EARLY)
    row, head = tl.program_id(0), tl.program_id(1)
    e, i = tl.arange(0, E), tl.arange(0, BLOCK)
    window, g = row // G, row % G
    branch, own = head // HEADS, head % HEADS
    place = ((window * H + head) * SPLITS + i) * G + g
    level = tl.load(level_ptr + place, mask=i < SPLITS, other=LOWEST)
    part = tl.load(part_ptr + place[:, None] * E + e, mask=i[:, None] < SPLITS, other=0.0)
    weight = tl.exp2(level - tl.max(level, 0))
    y = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    if NOISE:  # the secondary's heads alone
        there = (i < N_NOISE) & (branch == 1)
        at = (own * N_NOISE + i[:, None]) * E + e
        key = tl.load(noise_key_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
        value = tl.load(noise_value_ptr + at, mask=there[:, None], other=0.0).to(tl.float32)
        q = tl.load(q_ptr + row * q_row + head * E + e).to(tl.float32) * (scale * LOG2E)
        scores = tl.where(there, tl.sum(key * q[None, :], 1), LOWEST)
        weight = tl.exp2(scores - tl.max(scores, 0))
        noise = tl.sum(value * weight[:, None], 0) / tl.sum(weight, 0)
        y += noise * tl.load(noise_scale_ptr + own).to(tl.float32)
    _release(EARLY)
    tl.store(y_ptr + ((branch * R + row) * HEADS + own) * E + e, y.to(y_ptr.dtype.element_ty))


@triton.jit
def fuse(
    x_ptr, hidden_ptr, outs_ptr, last_w_ptr, last_b_ptr, norm_w_ptr, norm_b_ptr, y_ptr, normed_ptr, R, hidden_row, EPS,
    D: tl.constexpr, GATE: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_GATE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    _follow(EARLY)
    row = tl.program_id(0)
    i, d = tl.arange(0, BLOCK_GATE), tl.arange(0, BLOCK_D)
    p_ptr, s_ptr = outs_ptr + row * (D + GATE), outs_ptr + (R + row) * (D + GATE)
    p = tl.load(p_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    s = tl.load(s_ptr + d, mask=d < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    hidden = tl.load(hidden_ptr + row * hidden_row + i, mask=i < GATE, other=0.0).to(tl.float32)
    hidden += tl.load(p_ptr + D + i, mask=i < GATE, other=0.0).to(tl.float32)
    hidden += tl.load(s_ptr + D + i, mask=i < GATE, other=0.0).to(tl.float32)
    hidden = _gelu(hidden)
    last = tl.load(last_w_ptr + i, mask=i < GATE, other=0.0).to(tl.float32)
    gate = 1 / (1 + tl.exp(-tl.sum(hidden * last, 0) - tl.load(last_b_ptr).to(tl.float32)))
    _release(EARLY)
    y = (x + s + gate * (p - s)).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * D + d, y, mask=d < D)
    normed = _normed(y.to(tl.float32), d, norm_w_ptr, norm_b_ptr, EPS, D)
    tl.store(normed_ptr + row * D + d, normed.to(y.dtype), mask=d < D)


@triton.jit
def most_likely(logits_ptr, token_ptr, logprob_ptr, logits_row, V: tl.constexpr, BLOCK: tl.constexpr):
    row, lane = tl.program_id(0), tl.arange(0, BLOCK)
    logits_ptr += row.to(tl.int64) * logits_row
    highest = tl.full([BLOCK], LOWEST, tl.float32)
    token = tl.zeros([BLOCK], tl.int32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        x = tl.load(logits_ptr + start + lane, mask=start + lane < V, other=LOWEST)
        x = tl.maximum(x, LOWEST)  # forbidden ones are -inf
        token = tl.where(x > highest, start + lane, token)
        higher = tl.maximum(highest, x)
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    top = tl.max(highest, 0)
    tl.store(token_ptr + row, tl.min(tl.where(highest == top, token, V), 0).to(tl.int64))
    tl.store(logprob_ptr + row, -tl.log(tl.sum(total * tl.exp(highest - top), 0)))


@triton.jit
def quantize(
    x_ptr, y_ptr, scales_ptr, x_window, x_head, x_position, y_window, scales_window, scales_head,
    T: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    window, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    e, t = tl.arange(0, E), tl.arange(0, BLOCK)
    source = x_ptr + window * x_window + head * x_head + e
    largest = tl.full([E], 1e-6, tl.float32)
    for start in tl.range(0, T, BLOCK, num_stages=3):
        at = start + t
        x = tl.load(source[None, :] + at[:, None] * x_position, mask=at[:, None] < T, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 0))
    scale = largest / 127
    tl.store(scales_ptr + window * scales_window + head * scales_head + e, scale)
    target = y_ptr + window * y_window + head * T * E + e
    for start in tl.range(0, T, BLOCK, num_stages=3):
        at = start + t
        x = tl.load(source[None, :] + at[:, None] * x_position, mask=at[:, None] < T, other=0.0).to(tl.float32)
        x = x / scale[None, :]
        x = tl.where(x < 0, x - 0.5, x + 0.5).to(tl.int8)  # towards zero: to the nearest
        tl.store(target[None, :] + at[:, None] * E, x, mask=at[:, None] < T)
