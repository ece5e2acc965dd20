"""Slow float64 versions of the C functions, written from the formulas and not from the C."""

from __future__ import annotations

import itertools
from statistics import NormalDist

import numpy as np

U = 2.0**-24  # half the distance between 1 and the next float32


def splitmix64(state):
    """SplitMix64's finaliser, elementwise."""
    z = np.asarray(state, np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def random_bits(count, seed, stream):
    """The first `count` uint64 of the stream (seed, stream)."""
    with np.errstate(over="ignore"):
        key = splitmix64(splitmix64(np.array([seed], np.uint64)) ^ np.uint64(stream))
        return splitmix64(key ^ np.arange(count, dtype=np.uint64))


def random_normal(count, seed, stream):
    """Box-Muller on pairs of 53-bit uniform numbers."""
    u, v = (random_bits(2 * count, seed, stream) >> np.uint64(11)).reshape(count, 2).T * 2.0**-53
    return np.sqrt(-2 * np.log(1 - u)) * np.cos(2 * np.pi * v)


def per_column(values, group, cols):
    """Values (rows, groups) repeated for each column of a group: (rows, cols)."""
    return np.repeat(values, group, axis=1)[:, :cols]


def decode(codes, scale, offset, group, levels=None):
    """scale * level[code] + offset in float64."""
    cols = codes.shape[1]
    wide = [per_column(a.astype(float), group, cols) for a in (scale, offset)]
    return wide[0] * (codes if levels is None else levels.astype(float)[codes]) + wide[1]


# Bits of a word and of a window, columns of a ring, multipliers, whether four bytes are added.
TRELLIS = {
    "trellis1": (1, 12, 1, (0xC853,), False),
    "trellis1w10": (1, 10, 1, (0x53C9,), False),
    "trellis1.5": (3, 12, 2, (0x0D47, 0xA371), False),
    "trellis2": (2, 12, 1, (0xE169,), False),
    "trellis2w10": (2, 10, 1, (0x19A1,), False),
    "trellis3": (3, 12, 1, (0x9D8B, 0x7681), True),
    "trellis3w14": (3, 14, 1, (0xC561, 0xE11F), True),
    "trellis4": (4, 12, 1, (0x5FED, 0xC23F), True),
    "trellis4w14": (4, 14, 1, (0x77C1, 0xBC13), True),
}


def window_levels(code, window, column=0):
    """Levels of windows of a trellis."""
    _, _, _, multipliers, wide = TRELLIS[code]
    product = window * multipliers[0 if wide else column] % 2**16
    if not wide:
        return product % 128 + product // 256 % 128
    high = product * multipliers[1] // 2**16
    return sum(z % 64 + z // 256 % 64 for z in (product, high))


def trellis_levels(code, words):
    """Levels of words (64 n, cols): windows go around rings in which four panels take turns."""
    bits, length, cols, _, _ = TRELLIS[code]
    panels = words[:, ::cols].reshape(-1, 4, 16, words.shape[1] // cols).astype(np.int64)
    ring = panels.swapaxes(1, 2).reshape(len(panels), 64, -1)
    window = sum(np.roll(ring, -i, axis=1) << bits * i for i in range(length // bits + 1))
    window = window.reshape(len(panels), 16, 4, -1).swapaxes(1, 2).reshape(len(words), -1)
    levels = np.zeros(words.shape, np.int64)
    for column in range(cols):
        levels[:, column::cols] = window_levels(code, window % 2**length, column)
    return levels


def viterbi(code, target, scale, steps, before):
    """Least sums of squared errors, and the windows that lead to each state, one step per row.

    target (64, cols) and scale (64) are those of the places of a ring. A state is the upper part of
    a window; `before` (states) are the sums to start with.
    """
    bits, length, cols, _, _ = TRELLIS[code]
    window = np.arange(2**length)
    levels = np.stack([window_levels(code, window, c) for c in range(cols)]).astype(float)
    states, sums, ways = len(window) >> bits, [before], []
    for step in range(steps):
        row = step % 64
        errors = ((target[row][:, None] - scale[row] * levels) ** 2).sum(0)
        total = (errors + sums[-1][window % states]).reshape(states, 2**bits)
        sums.append(total.min(1))
        ways.append(total.argmin(1) + np.arange(states) * 2**bits)
    return sums, ways


def trellis_error(code, target, scale):
    """Squared error of a ring: two turns from any state say where a third begins and ends."""
    bits, length = TRELLIS[code][:2]
    states = 2 ** (length - bits)
    sums, ways = viterbi(code, target, scale, 128, np.zeros(states))
    state = sums[-1].argmin()
    for way in ways[:63:-1]:
        state = way[state] % states
    first = np.where(np.arange(states) == state, 0, np.inf)
    return viterbi(code, target, scale, 64, first)[0][-1][state]


def lattice_magnitudes():
    """Twice the magnitudes (256, 8): all of norm up to 40, every other one of norm 48 without 5."""
    sizes = list(itertools.product((1, 3, 5), repeat=8))
    norms = [sum(x * x for x in size) for size in sizes]
    small = [size for size, norm in zip(sizes, norms, strict=True) if norm <= 40]
    edge = [s for s, norm in zip(sizes, norms, strict=True) if norm == 48 and max(s) == 3]
    return np.array(small + edge[::2] + edge[-1:])


def lattice_levels(codes):
    """Levels of 2-bit codes (rows, 8 n): each 16-bit word is a point of E8 + 1/4."""
    digits = codes.reshape(len(codes), -1, 8).astype(np.int64)
    word = (digits << 2 * np.arange(8)).sum(2)
    size = lattice_magnitudes()[word & 255]
    negative = word[..., None] >> 8 + np.arange(7) & 1
    last = (size.sum(2) // 2 + negative.sum(2)) % 2  # so that half the signed sum is even
    sign = 1 - 2 * np.concatenate([negative, last[..., None]], axis=2)
    return (5 + (word >> 15)[..., None] + sign * size).reshape(codes.shape)


def normal_quantiles(count):
    """Means of `count` equally probable intervals of a normal variable."""
    edges = np.array([NormalDist().inv_cdf(i / count) for i in range(1, count)])
    density = np.concatenate([[0], np.exp(-(edges**2) / 2), [0]]) / np.sqrt(2 * np.pi)
    return -np.diff(density) * count


def best_grid_error(weight, count, symmetric):
    """Smallest squared error of each row over a mesh of uniform grids, each refitted once."""
    best = np.full(len(weight), np.inf)
    w = weight.astype(float)
    width = np.ptp(w, axis=1, keepdims=True)
    largest = 2 * abs(w).max(1, keepdims=True)
    for size in np.geomspace(0.02, 1.2, 120):
        scale = size * (largest if symmetric else width) / (count - 1)
        for place in [0.5] if symmetric else np.linspace(0, 1, 40):
            middle = 0 if symmetric else w.min(1, keepdims=True) + place * width
            code = np.clip(np.rint((w - middle) / scale + (count - 1) / 2), 0, count - 1)
            v = code - (count - 1) / 2
            centre = 0 if symmetric else w.mean(1, keepdims=True)
            v = v if symmetric else v - v.mean(1, keepdims=True)
            spread = np.maximum((v * v).sum(1), 1e-300)
            error = ((w - centre) ** 2).sum(1) - np.maximum((v * w).sum(1), 0) ** 2 / spread
            best = np.minimum(best, error)
    return best


def kmeans_error(values, count, weights=None):
    """Smallest weighted squared error of `count` clusters, trying every last interval."""
    order = np.argsort(values)
    x, w = values[order], (np.ones(len(values)) if weights is None else weights[order])

    def cost(begin, end):
        part, share = x[begin:end], w[begin:end]
        return (share * (part - np.average(part, weights=share)) ** 2).sum() if end > begin else 0

    best = [cost(0, end) for end in range(len(x) + 1)]
    for _ in range(count - 1):
        best = [min(best[b] + cost(b, end) for b in range(end + 1)) for end in range(len(x) + 1)]
    return best[-1]


def packed_codes(codes, bits):
    """Codes (16, step) of one step as the bytes of its blocks, straight from packed.h's table."""
    if bits == 3:
        parts = np.split(codes, codes.shape[1] // 32, axis=1)
        return b"".join(_blocks(p & 3, 2).tobytes() + _blocks(p >> 2, 1).tobytes() for p in parts)
    blocks = _blocks(codes, bits)
    return (blocks.transpose(0, 2, 1) if bits == 1 else blocks).tobytes()


def packed_rings(words, bits):
    """Words (64, columns) of a strip's step as the bytes of its four panels, from core/ring.h."""
    shifted = words.reshape(4, 16, -1).astype(np.int64) << bits * np.arange(4)[:, None, None]
    quarters = np.split(shifted.sum(0), 4, axis=1)
    if bits <= 2:
        return [packed_codes(quarter, 4 * bits) for quarter in quarters]
    columns, above = (8, 4) if bits == 3 else (4, 8)
    return [
        b"".join(
            packed_codes(part % 256, 8) + packed_codes(part // 256, above)
            for part in np.split(quarter, quarter.shape[1] // columns, axis=1)
        )
        for quarter in quarters
    ]


def _blocks(codes, bits):
    """Blocks of bytes (block, row, i)."""
    planes = 8 // bits
    out = np.zeros((codes.shape[1] // (4 * planes), 16, 4), np.uint8)
    for row, k in np.ndindex(codes.shape):
        block, inside = divmod(k, 4 * planes)
        out[block, row, inside % 4] |= codes[row, k] << inside // 4 * bits
    return out


def quantize_activations(x, step, limit):
    """Per token and step of x (t, cols) float32: integers (t, cols) and scales (t, steps)."""
    q = np.empty(x.shape)
    scales = []
    for begin in range(0, x.shape[1], step):
        part = x[:, begin : begin + step]
        largest = abs(part).max(axis=1, keepdims=True)
        silent = largest < np.float32(2.0**-100)
        inverse = np.float32(limit) / np.where(silent, np.float32(1), largest)
        q[:, begin : begin + step] = np.where(silent, 0, np.rint(part * inverse))
        scales.append(np.where(silent, np.float32(0), largest / np.float32(limit)))
    return q, np.hstack(scales)


def fake_quantize(x, clip, scale, zero, *, bits, step, rounding=None):
    """Rows of x rounded as csrc/linear/fake.h says, in float64, and what its way back holds fixed.

    `rounding`, an earlier second result: errors of rounding, codes, and what is clipped.
    """
    limit = (1 << (bits - 1)) - 1
    if np.isnan(zero):
        zero = (x.max(1, keepdims=True) + x.min(1, keepdims=True)) / 2
    y, held = np.empty_like(x), []
    for i, begin in enumerate(range(0, x.shape[1], step)):
        columns = slice(begin, begin + step)
        part = x[:, columns] - zero
        s = scale or clip * abs(part).max(1, keepdims=True) / limit
        if rounding is None:
            v = part / s
            code = np.rint(np.clip(v, -limit, limit))
            held.append((code - v, code, abs(v) >= limit * (1 - 2.0**-20)))
        error, code, clipped = held[i] if rounding is None else rounding[i]
        y[:, columns] = np.where(clipped, s * code + zero, x[:, columns] + s * error)
    return y, rounding or held


def byte_levels(levels):
    """Base, step and integers with level ~ base + step * integer; 1 to 255, or 0 and 1 exactly."""
    levels = levels.astype(float)
    if len(levels) == 2:
        return levels[0], levels[1] - levels[0], np.arange(2)
    step = abs(levels).max() / 127
    return -128 * step, step, 128 + np.rint(levels / step)


def quantized_linear(codes, scale, offset, group, x, bias, limit, levels=None):
    """y (t, rows) for rounded activations and levels, and a bound on its error in float32.

    A step adds at most two rounded terms; each was itself rounded at most six times.
    """
    base, unit = 0.0, 1.0
    if levels is not None:
        base, unit, integers = byte_levels(levels)
        codes = integers[codes]
    cols = codes.shape[1]
    step = group if group < cols else 64
    steps = -(-cols // step)
    q, x_scale = quantize_activations(x, step, limit)
    values = q * per_column(x_scale.astype(np.float64), step, cols)
    scale, offset = scale.astype(np.float64), offset.astype(np.float64)
    y = values @ decode(codes, unit * scale, offset + base * scale, group).T
    sums = np.zeros(y.shape)
    for begin in range(0, cols, step):
        part = slice(begin, begin + step)
        gain, apart = (abs(a[:, begin // group]) for a in (scale, offset))
        sums += abs(values[:, part] @ codes[:, part].T) * unit * gain
        sums += abs(values[:, part].sum(axis=1, keepdims=True)) * (apart + abs(base) * gain)
    bias = np.zeros(codes.shape[0]) if bias is None else bias
    return y + bias, (2 * steps + 8) * U * 1.01 * (sums + abs(bias))


def float_linear(weight, x, bias):
    """y (t, rows) in float64, and a bound for cols float32 products and sums in any order."""
    weight, x = weight.astype(np.float64), x.astype(np.float64)
    bias = np.zeros(len(weight)) if bias is None else bias.astype(np.float64)
    size = abs(x) @ abs(weight).T + abs(bias)
    return x @ weight.T + bias, (weight.shape[1] + 3) * U * 1.01 * size


def entropy_losses(counts, levels):
    """Migacz's divergence for each number of bins kept, from `levels` to all."""
    losses = []
    for kept in range(levels, len(counts) + 1):
        p = counts[:kept].astype(float)
        p[-1] += counts[kept:].sum()
        q = np.zeros(kept)
        for run in np.split(np.arange(kept), [kept * i // levels for i in range(1, levels)]):
            used = run[p[run] > 0]
            q[used] = counts[run].sum() / max(len(used), 1)
        used = p > 0
        p, q = p / p.sum(), q / max(q.sum(), 1)
        with np.errstate(divide="ignore"):
            losses.append((p[used] * np.log(p[used] / q[used])).sum())
    return np.array(losses)


def gptq_grid(x, bits, search, norm=2.4, grid=100, maxshrink=0.8):
    """Scale and zero of each row, in float32 as GPTQ's quant.py (IST-DASLab, 2022) finds them."""
    maxq = 2**bits - 1
    xmin, xmax = np.minimum(x.min(1), np.float32(0)), np.maximum(x.max(1), np.float32(0))
    constant = (xmin == 0) & (xmax == 0)
    xmin[constant], xmax[constant] = -1, 1
    scale = (xmax - xmin) / np.float32(maxq)
    zero = np.round(-xmin / scale)
    best = np.full(len(x), np.inf, np.float32)
    for i in range(int(maxshrink * grid) if search else 0):
        p = np.float32(1 - i / grid)
        xmin1, xmax1 = p * xmin, p * xmax
        scale1 = (xmax1 - xmin1) / np.float32(maxq)
        zero1 = np.round(-xmin1 / scale1)
        error = np.abs(gptq_values(x, scale1, zero1, maxq) - x) ** np.float32(norm)
        error = error.sum(1)
        better = error < best
        best[better], scale[better], zero[better] = error[better], scale1[better], zero1[better]
    return scale, zero


def gptq_values(x, scale, zero, maxq):
    """The result of quantize() in the same file."""
    scale, zero = scale[:, None], zero[:, None]
    return scale * (np.clip(np.round(x / scale) + zero, 0, maxq) - zero)


def gptq(H, W, group, order, fit, encode, decode, damping=0.01):
    """Published GPTQ, column by column: the upper Cholesky factor of H^-1, weights updated.

    fit(weights (rows, columns)) -> scale, offset (rows); encode(values, scale, offset) -> codes.
    Returns codes (rows, cols), scale and offset (rows, groups).
    """
    rows, cols = W.shape
    groups = -(-cols // group)
    W = W.astype(np.float64)[:, order]
    H = H[np.ix_(order, order)] + damping * np.mean(np.diag(H)) * np.eye(cols)
    U = np.linalg.cholesky(np.linalg.inv(H)).T
    codes = np.zeros((rows, cols), np.uint8)
    scale, offset = np.zeros((2, rows, groups))
    of_group = np.asarray(order) // group
    for j in range(cols):
        g = of_group[j]
        if j == 0 or g != of_group[j - 1]:
            scale[:, g], offset[:, g] = fit(W[:, of_group == g])
        codes[:, order[j]] = encode(W[:, j], scale[:, g], offset[:, g])
        value = decode(codes[:, order[j]], scale[:, g], offset[:, g])
        W[:, j:] -= np.outer((W[:, j] - value) / U[j, j], U[j, j:])
    return codes, scale, offset


UNIT = 2.0**-24  # largest relative rounding error of float32


def rmsnorm(x, gain, epsilon):
    """Result and bound: cols + 2 roundings in the mean square count half, five follow."""
    x, gain = x.astype(float), np.ones(x.shape[-1]) if gain is None else gain.astype(float)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * gain
    return y, abs(y) * ((x.shape[-1] + 2) / 2 + 5) * UNIT + (1 + abs(gain)) * 2.0**-150


def swiglu(gate, up):
    """exp is good to 4 units, four roundings follow; exp(-gate) overflows at -gate = 88.7."""
    gate, up = gate.astype(float), up.astype(float)
    y = gate / (1 + np.exp(-gate)) * up
    beyond = np.where(gate < -88, abs(gate) * np.exp(-88.0), 0) * abs(up)
    return y, abs(y) * 9 * UNIT + beyond + 2.0**-149


def rope(x, frequency, first, factor=1.0):
    """x (tokens, heads, d); each of four factors and products and one sum is rounded."""
    angle = (first + np.arange(len(x)))[:, None, None] * frequency
    cosine, sine = np.cos(angle) * factor, np.sin(angle) * factor
    a, b = np.split(x.astype(float), 2, axis=-1)
    y = np.concatenate([a * cosine - b * sine, b * cosine + a * sine], axis=-1)
    size = [abs(a * cosine) + abs(b * sine), abs(b * cosine) + abs(a * sine)]
    return y, 4 * UNIT * np.concatenate(size, axis=-1)


def attention(q, k, v):
    """Causal attention of q (t, heads, d), the last t of k, v (s, kv heads, d).

    A score is off by d + 2 roundings of its terms, a weight by twice the worst score, by the
    rounding of its distance from the maximum, by exp and by one factor per 256 keys; the sum of
    weights and the sum of values take a rounding per key.
    """
    q, k, v = (x.astype(float) for x in (q, k, v))
    tokens, heads, d = q.shape
    keys = len(k)
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    hidden = np.arange(keys) > np.arange(tokens)[:, None] + keys - tokens
    score = np.einsum("thd,shd->hts", q, k) / np.sqrt(d)
    size = np.einsum("thd,shd->hts", abs(q), abs(k)) / np.sqrt(d)
    score = np.where(hidden, -np.inf, score)
    weight = np.exp(score - score.max(-1, keepdims=True))
    total = weight.sum(-1, keepdims=True)
    o = np.einsum("hts,shd->thd", weight / total, v)
    worst = np.where(hidden, 0, size).max(-1) * (d + 2) * UNIT
    spread = np.where(hidden, 0, score.max(-1, keepdims=True) - score).max(-1) * UNIT
    relative = 2 * worst + 2 * spread + (2 * keys + 8 + 6 * (keys // 256 + 1)) * UNIT
    bound = np.einsum("hts,shd->thd", weight / total, abs(v)) * relative.T[:, :, None]
    return o, bound + 2.0**-149


def attention_logs(q, k):
    """Logarithms of causal attention's weights, (heads, t, t), -infinity where a key is hidden."""
    q, k = (x.astype(float) for x in (q, k))
    tokens, heads, d = q.shape
    k = np.repeat(k, heads // k.shape[1], axis=1)
    score = np.einsum("thd,shd->hts", q, k) / np.sqrt(d)
    score = np.where(np.tri(tokens, dtype=bool), score, -np.inf)
    score = score - score.max(-1, keepdims=True)
    return score - np.log(np.exp(score).sum(-1, keepdims=True))


def attention_divergence(q, k, target_q, target_k):
    """KL(target || own) of each query, (t, heads), in nats."""
    own, target = attention_logs(q, k), attention_logs(target_q, target_k)
    gap = np.subtract(target, own, out=np.zeros_like(own), where=np.isfinite(own))
    return (np.exp(target) * gap).sum(-1).T


def _exp_error(gap):
    """Relative error of exp(gap): the kernel's four units, and the rounding of gap itself."""
    return (4 + abs(gap)) * UNIT


def cross_entropy(logits, target):
    """Nats and bound, row by row."""
    x = logits.astype(float)
    gap = x - x.max(-1, keepdims=True)
    weight = np.exp(gap)
    nll = np.log(weight.sum(-1)) - gap[np.arange(len(x)), target]
    return nll, (weight * _exp_error(gap)).sum(-1) / weight.sum(-1) + 1e-12 + 2e-38 * x.shape[-1]


def kl_divergence(p, q):
    """Nats and bound, row by row; both logit differences and exponentials are rounded."""
    a, b = (x.astype(float) - x.max(-1, keepdims=True) for x in (p, q))
    p_sum, q_sum = np.exp(a).sum(-1), np.exp(b).sum(-1)
    P = np.exp(a) / p_sum[:, None]
    gap = (P * (a - b)).sum(-1)
    kl = gap - np.log(p_sum) + np.log(q_sum)
    p_error, q_error = ((np.exp(x) * _exp_error(x)).sum(-1) for x in (a, b))
    rounding = (P * (_exp_error(a) * abs(a - b) + UNIT * (abs(a) + abs(b) + abs(a - b)))).sum(-1)
    return kl, rounding + (1 + abs(gap)) * p_error / p_sum + q_error / q_sum + 1e-12


def kronecker(bases, power, x):
    """Rows of (B_1 ⊗ ... ⊗ B_m ⊗ H) x, H the `power`-fold Kronecker power of [1 1; 1 -1]."""
    matrices = [np.asarray(b, float) for b in bases] + [np.array([[1.0, 1], [1, -1]])] * power
    y = np.asarray(x, float).reshape(len(x), -1)
    for matrix in matrices:
        y = matrix @ y.reshape(-1, len(matrix), y.shape[-1] // len(matrix))
    return y.reshape(len(x), -1)


def projections(network, block, x):
    """Queries, keys and values of a block of a `decoder`, for its input x (t, hidden)."""
    epsilon, heads = network["epsilon"], [network[n] for n in ("heads", "kv_heads", "kv_heads")]
    n = rmsnorm(x, block["attention_norm"], epsilon)[0]
    layers = (block[name] for name in ("q_proj", "k_proj", "v_proj"))
    q, k, v = (_linear(p, n).reshape(len(x), h, -1) for p, h in zip(layers, heads, strict=True))
    if block["query_norm"] is not None:
        q, k = (rmsnorm(a, block[f"{n}_norm"], epsilon)[0] for a, n in ((q, "query"), (k, "key")))
    if block.get("rope", True):
        q, k = (rope(a, network["frequency"], 0)[0] for a in (q, k))
    return q, k, v


def _linear(layer, x):
    if callable(layer):
        return layer(x)
    weight, bias = layer
    return x @ weight.astype(float).T + (0 if bias is None else bias)


def decoder(network, tokens):
    """Logits of a network in float64, straight from the formulas.

    `network` has embedding, final_norm, head, frequency, heads, kv_heads, epsilon and blocks, each
    a dict of norms (arrays or None), linear layers (weight, bias or None; or functions), scales and
    whether it has rope; perhaps the matrix that rotates the residual stream.
    """
    turn = network.get("rotation", np.eye(network["embedding"].shape[1]))

    def normed(x, gain):
        return rmsnorm(x, gain, network["epsilon"])[0]

    x = network["embedding"].astype(float)[tokens] @ turn.T
    for block in network["blocks"]:
        attended = attention(*projections(network, block, x))[0].reshape(len(x), -1)
        added = _linear(block["o_proj"], attended)
        x = x + block.get("attention_scale", 1.0) * added
        n = normed(x, block["mlp_norm"])
        inner = swiglu(_linear(block["gate_proj"], n), _linear(block["up_proj"], n))[0]
        x = x + block.get("mlp_scale", 1.0) * _linear(block["down_proj"], inner)
    head = network["embedding"] if network["head"] is None else network["head"]
    return normed(x @ turn, network["final_norm"]) @ head.astype(float).T


def gram(cols, seed, decay=1.0):
    """X^T X / n of correlated inputs whose variances fall as a power law."""
    rng = np.random.default_rng([seed, cols])
    basis = np.linalg.qr(rng.standard_normal((cols, cols)))[0]
    spread = np.arange(1, cols + 1) ** (-decay / 2)
    x = rng.standard_normal((4 * cols + 50, cols)) * spread @ basis.T
    return x.T @ x / len(x)


def output_loss(weight, values, hessian):
    """e H e^T for the error e of each row."""
    error = weight.astype(float) - values
    return np.einsum("rk,kl,rl->r", error, hessian, error)
