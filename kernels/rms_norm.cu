// RMS norm, fused with the residual add before it (src/ops/rms_norm.rs):
//
//   r    = narrow(x + multiplier * delta)     with `add`; else x
//   rstd = 1 / sqrt(mean(r^2) + eps)
//   y    = w * r * rstd
//   dr   = past + rstd * (w * dy - r * rstd^2 * mean(w * dy * r))     past only with `add`
//
// A block makes a row. The first KEPT * 8 * threads columns stay in registers between the sum and its use, the others
// are read again: the results are the same.
//
// grid: (rows, 1, 1), threads: width / (8 * KEPT) rounded up to a multiple of 32, at most 384 (widths to 6144 are kept)
#define KEPT 2

struct RmsNormParameters {
    uint rows, width;
    float eps, multiplier;
    uint add, aligned;
};

INLINE uint left(uint at, uint width) { return at < width ? width - at : 0; }

// What the forward pass reads, and the sum that it writes.
struct Stream {
    GLOBAL(const Element) x;
    GLOBAL(const Element) delta;
    GLOBAL(Element) residual;
    float multiplier;
    bool add, aligned;
};

// r[0..8] from `at`; returns their sum of squares.
INLINE float add8(Stream s, index_t at, uint count, LOCAL(float) r) {
    load8(s.x, at, count, s.aligned, r);
    if (s.add) {
        float d[8];
        load8(s.delta, at, count, s.aligned, d);
        UNROLL for (uint i = 0; i < 8; ++i) r[i] = wide(narrow(r[i] + s.multiplier * d[i]));
        store8(s.residual, at, count, s.aligned, r);
    }
    float square = 0.0f;
    UNROLL for (uint i = 0; i < 8; ++i) square += r[i] * r[i];
    return square;
}

KERNEL(rms_norm_forward, 384, IN(0, Element, x), IN(1, Element, delta), IN(2, Element, weight),
       OUT(3, Element, residual), OUT(4, Element, normed), OUT(5, float, rstd), PARAMETERS(6, RmsNormParameters, p)) {
    SHARED(float, sums, 32);
    const index_t row = index_t(BLOCK_X) * p.width;
    const uint step = THREADS * 8;
    const Stream stream = {x + row, delta + row, residual + row, p.multiplier, p.add != 0, p.aligned != 0};
    float kept[KEPT][8], square = 0.0f;
    UNROLL for (uint c = 0; c < KEPT; ++c) {
        const uint at = THREAD * 8 + c * step;
        square += add8(stream, at, left(at, p.width), kept[c]);
    }
    for (uint at = THREAD * 8 + KEPT * step; at < p.width; at += step) {
        float r[8];
        square += add8(stream, at, p.width - at, r);
    }
    const float s = rsqrt_(block_sum(square, sums, THREAD, THREADS) / float(p.width) + p.eps);
    if (THREAD == 0) rstd[BLOCK_X] = s;

    UNROLL for (uint c = 0; c < KEPT; ++c) {
        const uint at = THREAD * 8 + c * step;
        float w[8];
        load8(weight, at, left(at, p.width), stream.aligned, w);
        UNROLL for (uint i = 0; i < 8; ++i) kept[c][i] *= w[i] * s;
        store8(normed, row + at, left(at, p.width), stream.aligned, kept[c]);
    }
    for (uint at = THREAD * 8 + KEPT * step; at < p.width; at += step) {
        float w[8], r[8];
        load8(weight, at, p.width - at, stream.aligned, w);
        if (stream.add) load8(residual, row + at, p.width - at, stream.aligned, r);
        else load8(x, row + at, p.width - at, stream.aligned, r);
        UNROLL for (uint i = 0; i < 8; ++i) r[i] *= w[i] * s;
        store8(normed, row + at, p.width - at, stream.aligned, r);
    }
}

// What the backward pass reads.
struct Gradients {
    GLOBAL(const Element) dy;
    GLOBAL(const Element) residual;
    GLOBAL(const Element) weight;
    bool aligned;
};

// g = w * dy and r[0..8] from `at`; returns the sum of their products.
INLINE float product8(Gradients s, uint at, uint count, LOCAL(float) g, LOCAL(float) r) {
    float w[8], dot = 0.0f;
    load8(s.dy, at, count, s.aligned, g);
    load8(s.residual, at, count, s.aligned, r);
    load8(s.weight, at, count, s.aligned, w);
    UNROLL for (uint i = 0; i < 8; ++i) {
        g[i] *= w[i];
        dot += g[i] * r[i];
    }
    return dot;
}

KERNEL(rms_norm_backward, 384, IN(0, Element, dy), IN(1, Element, residual), IN(2, float, rstd), IN(3, Element, weight),
       IN(4, Element, past), OUT(5, Element, dx), PARAMETERS(6, RmsNormParameters, p)) {
    SHARED(float, sums, 32);
    const index_t row = index_t(BLOCK_X) * p.width;
    const uint step = THREADS * 8;
    const Gradients in = {dy + row, residual + row, weight, p.aligned != 0};
    float g[KEPT][8], r[KEPT][8], dot = 0.0f;
    UNROLL for (uint c = 0; c < KEPT; ++c) {
        const uint at = THREAD * 8 + c * step;
        dot += product8(in, at, left(at, p.width), g[c], r[c]);
    }
    for (uint at = THREAD * 8 + KEPT * step; at < p.width; at += step) {
        float g_[8], r_[8];
        dot += product8(in, at, p.width - at, g_, r_);
    }
    const float s = rstd[BLOCK_X], k = s * s * s * block_sum(dot, sums, THREAD, THREADS) / float(p.width);

    UNROLL for (uint c = 0; c < KEPT; ++c) {
        const uint at = THREAD * 8 + c * step;
        float out[8];
        load8(past, row + at, p.add ? left(at, p.width) : 0, in.aligned, out);
        UNROLL for (uint i = 0; i < 8; ++i) out[i] += s * g[c][i] - k * r[c][i];
        store8(dx, row + at, left(at, p.width), in.aligned, out);
    }
    for (uint at = THREAD * 8 + KEPT * step; at < p.width; at += step) {
        float g_[8], r_[8], out[8];
        product8(in, at, p.width - at, g_, r_);
        load8(past, row + at, p.add ? p.width - at : 0, in.aligned, out);
        UNROLL for (uint i = 0; i < 8; ++i) out[i] += s * g_[i] - k * r_[i];
        store8(dx, row + at, p.width - at, in.aligned, out);
    }
}
