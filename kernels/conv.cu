// Causal convolution with SiLU (src/ops/conv/mod.rs):
//
//   v_t  = bias + sum over d of weight[taps - 1 - d] * x_{t-d}       y = v * sigmoid(v)
//   dv   = dy * sigmoid(v) * (1 + v * (1 - sigmoid(v)))
//   dx_t = sum over d of weight[taps - 1 - d] * dv_{t+d}, and what the rows of other segments and the ends give
//
// The host lists the rows that each row reads, and those of which each gradient is the sum.

// Source of a row: no row, a row of the tails, or else a row of x.
#define NO_ROW 0xffffffffu
#define TAIL (1u << 31)
// Term of a gradient: a row of the gradient of the ends, or else row * taps + d of dv.
#define END (1u << 31)

struct ConvParameters {
    uint rows, channels, taps;
    uint aligned;
};

INLINE float sigmoid(float x) { return reciprocal_(1.0f + exp_(-x)); }

// What a row's threads read.
struct Rows {
    GLOBAL(const Element) x;
    GLOBAL(const Element) tails;
    GLOBAL(const float) weight;
    GLOBAL(const float) bias;
    GLOBAL(const uint) sources;
};

// v of 8 channels of a row.
INLINE void preactivation8(Rows from, GIVEN(ConvParameters) p, uint row, uint at, LOCAL(float) v) {
    const uint left = p.channels - at;
    load8(from.bias, at, left, p.aligned != 0, v);
    for (uint d = 0; d < p.taps; ++d) {
        const uint source = d == 0 ? row : from.sources[index_t(row) * (p.taps - 1) + (d - 1)];
        if (source == NO_ROW) continue;
        float x[8];
        const index_t first = index_t(source & ~TAIL) * p.channels + at;
        if (source & TAIL) load8(from.tails, first, left, p.aligned != 0, x);
        else load8(from.x, first, left, p.aligned != 0, x);
        UNROLL for (uint i = 0; i < 8; ++i)
            if (i < left) v[i] += from.weight[index_t(at + i) * p.taps + (p.taps - 1 - d)] * x[i];
    }
}

// grid: (rows, ceil(channels / (8 * threads)), 1), threads: a multiple of 32, at most 256
KERNEL(conv_forward, 256, IN(0, Element, x), IN(1, Element, tails), IN(2, float, weight), IN(3, float, bias),
       IN(4, uint, sources), OUT(5, Element, y), PARAMETERS(6, ConvParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.channels) return;
    const Rows from = {x, tails, weight, bias, sources};
    float v[8];
    preactivation8(from, p, BLOCK_X, at, v);
    UNROLL for (uint i = 0; i < 8; ++i) v[i] *= sigmoid(v[i]);
    store8(y, index_t(BLOCK_X) * p.channels + at, p.channels - at, p.aligned != 0, v);
}

// dv; the grid and the threads are those of conv_forward.
KERNEL(conv_backward_silu, 256, IN(0, Element, dy), IN(1, Element, x), IN(2, Element, tails), IN(3, float, weight),
       IN(4, float, bias), IN(5, uint, sources), OUT(6, float, dv), PARAMETERS(7, ConvParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.channels) return;
    const Rows from = {x, tails, weight, bias, sources};
    const index_t first = index_t(BLOCK_X) * p.channels + at;
    float v[8], d[8];
    preactivation8(from, p, BLOCK_X, at, v);
    load8(dy, first, p.channels - at, p.aligned != 0, d);
    UNROLL for (uint i = 0; i < 8; ++i) {
        const float s = sigmoid(v[i]);
        v[i] = d[i] * s * (1.0f + v[i] * (1.0f - s));
    }
    store8(dv, first, p.channels - at, p.aligned != 0, v);
}

// The gradients of the rows of x, then of the rows of the tails: terms[offsets[i]..offsets[i + 1]] each.
// grid: (rows and rows of the tails, ceil(channels / (8 * threads)), 1), threads: as conv_forward
KERNEL(conv_backward, 256, IN(0, float, dv), IN(1, float, dends), IN(2, float, weight), IN(3, uint, offsets),
       IN(4, uint, terms), OUT(5, Element, dx), OUT(6, float, dtails), PARAMETERS(7, ConvParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.channels) return;
    const uint left = p.channels - at, end = offsets[BLOCK_X + 1];
    float sum[8];
    UNROLL for (uint i = 0; i < 8; ++i) sum[i] = 0.0f;
    for (uint term = offsets[BLOCK_X]; term < end; ++term) {
        const uint code = terms[term];
        float values[8];
        if (code & END) {
            load8(dends, index_t(code & ~END) * p.channels + at, left, p.aligned != 0, values);
            UNROLL for (uint i = 0; i < 8; ++i) sum[i] += values[i];
        } else {
            const uint d = code % p.taps;
            load8(dv, index_t(code / p.taps) * p.channels + at, left, p.aligned != 0, values);
            UNROLL for (uint i = 0; i < 8; ++i)
                if (i < left) sum[i] += weight[index_t(at + i) * p.taps + (p.taps - 1 - d)] * values[i];
        }
    }
    if (BLOCK_X < p.rows) store8(dx, index_t(BLOCK_X) * p.channels + at, left, p.aligned != 0, sum);
    else store8(dtails, index_t(BLOCK_X - p.rows) * p.channels + at, left, p.aligned != 0, sum);
}

// Copies rows of x and of the tails.
// grid: (rows of the ends, ceil(channels / (8 * threads)), 1), threads: as conv_forward
KERNEL(conv_ends, 256, IN(0, Element, x), IN(1, Element, tails), IN(2, uint, sources), OUT(3, Element, ends),
       PARAMETERS(4, ConvParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.channels) return;
    const uint source = sources[BLOCK_X], left = p.channels - at;
    const index_t first = index_t(source & ~TAIL) * p.channels + at;
    float values[8];
    UNROLL for (uint i = 0; i < 8; ++i) values[i] = 0.0f;
    if (source != NO_ROW) {
        if (source & TAIL) load8(tails, first, left, p.aligned != 0, values);
        else load8(x, first, left, p.aligned != 0, values);
    }
    store8(ends, index_t(BLOCK_X) * p.channels + at, left, p.aligned != 0, values);
}
