// RMS norm, fused with the residual add before it (src/ops/rms_norm/mod.rs):
//
//   r    = narrow(x + multiplier * delta)     with `add`; else x
//   rstd = 1 / sqrt(mean(r^2) + eps)
//   y    = w * r * rstd
//   dr   = dresidual + rstd * (w * dy - r * rstd^2 * mean(w * dy * r))     dresidual only with `add`
//
// A block makes a row. The first KEPT * 8 * threads columns stay in registers between the sum and its use, the others
// are read again: the results are the same.
//
// grid: (rows, 1, 1), threads: width / (8 * KEPT) rounded up to a multiple of 32, at most 384 (widths to 6144 stay in registers)
#define KEPT 2

struct RmsNormParameters {
    uint rows, width;
    float eps, multiplier;
    uint add, aligned;
};

INLINE uint left(uint at, uint width) { return at < width ? width - at : 0; }

// 8 of a row from column `at`, zeros after its end. With `whole` (rows on 16-byte boundaries, of a multiple of 8) there is
// no branch around the access, so that several are in flight at a time: after the end the row's start is read instead.
template <bool whole>
INLINE void take8(GLOBAL(const Element) row, uint at, uint width, LOCAL(float) out) {
    if (whole) {
        const bool inside = at < width;
        load8(row, inside ? at : 0, 8, true, out);
        UNROLL for (uint i = 0; i < 8; ++i) out[i] = inside ? out[i] : 0.0f;
    } else {
        load8(row, at, left(at, width), false, out);
    }
}
template <bool whole>
INLINE void put8(GLOBAL(Element) row, uint at, uint width, LOCAL(const float) values) {
    if (at < width) store8(row, at, whole ? 8 : width - at, whole, values);
}
INLINE float dot8(LOCAL(const float) x, LOCAL(const float) y) {
    float sum = 0.0f;
    UNROLL for (uint i = 0; i < 8; ++i) sum += x[i] * y[i];
    return sum;
}

// A thread of a block, and memory for the block's sum.
struct Worker {
    uint index, count;
    GROUP(float) sums;
};

// One row of each matrix.
struct Forward {
    GLOBAL(const Element) x;
    GLOBAL(const Element) delta;
    GLOBAL(const Element) weight;
    GLOBAL(Element) residual;
    GLOBAL(Element) normed;
};

// The sum of the streams, rounded as it is stored.
INLINE void add8(LOCAL(float) r, LOCAL(const float) d, float multiplier) {
    UNROLL for (uint i = 0; i < 8; ++i) r[i] = wide(narrow(r[i] + multiplier * d[i]));
}

template <bool whole>
INLINE void norm8(Forward row, uint at, uint width, float rstd, LOCAL(float) r) {
    float w[8];
    take8<whole>(row.weight, at, width, w);
    UNROLL for (uint i = 0; i < 8; ++i) r[i] *= w[i] * rstd;
    put8<whole>(row.normed, at, width, r);
}

// Returns the row's rstd.
template <bool whole>
INLINE float forward(Forward row, GIVEN(RmsNormParameters) p, Worker worker) {
    const uint first = worker.index * 8, step = worker.count * 8;
    float kept[KEPT][8], square = 0.0f;
    if (p.add) {
        float d[KEPT][8];
        UNROLL for (uint c = 0; c < KEPT; ++c) {
            take8<whole>(row.x, first + c * step, p.width, kept[c]);
            take8<whole>(row.delta, first + c * step, p.width, d[c]);
        }
        UNROLL for (uint c = 0; c < KEPT; ++c) {
            add8(kept[c], d[c], p.multiplier);
            put8<whole>(row.residual, first + c * step, p.width, kept[c]);
        }
    } else {
        UNROLL for (uint c = 0; c < KEPT; ++c) take8<whole>(row.x, first + c * step, p.width, kept[c]);
    }
    UNROLL for (uint c = 0; c < KEPT; ++c) square += dot8(kept[c], kept[c]);
    for (uint at = first + KEPT * step; at < p.width; at += step) {
        float r[8];
        take8<whole>(row.x, at, p.width, r);
        if (p.add) {
            float d[8];
            take8<whole>(row.delta, at, p.width, d);
            add8(r, d, p.multiplier);
            put8<whole>(row.residual, at, p.width, r);
        }
        square += dot8(r, r);
    }
    square = block_sum(square, worker.sums, worker.index, worker.count);
    const float rstd = rsqrt_(square / float(p.width) + p.eps);

    UNROLL for (uint c = 0; c < KEPT; ++c) norm8<whole>(row, first + c * step, p.width, rstd, kept[c]);
    for (uint at = first + KEPT * step; at < p.width; at += step) {
        float r[8];
        if (p.add) take8<whole>(row.residual, at, p.width, r);
        else take8<whole>(row.x, at, p.width, r);
        norm8<whole>(row, at, p.width, rstd, r);
    }
    return rstd;
}

KERNEL(rms_norm_forward, 384, IN(0, Element, x), IN(1, Element, delta), IN(2, Element, weight),
       OUT(3, Element, residual), OUT(4, Element, normed), OUT(5, float, rstd), PARAMETERS(6, RmsNormParameters, p)) {
    SHARED(float, sums, 32);
    const index_t at = index_t(BLOCK_X) * p.width;
    const Forward row = {x + at, delta + at, weight, residual + at, normed + at};
    const Worker worker = {THREAD, THREADS, sums};
    const float s = p.aligned ? forward<true>(row, p, worker) : forward<false>(row, p, worker);
    if (THREAD == 0) rstd[BLOCK_X] = s;
}

// One row of each matrix.
struct Backward {
    GLOBAL(const Element) dy;
    GLOBAL(const Element) residual;
    GLOBAL(const Element) weight;
    GLOBAL(const Element) dresidual;
    GLOBAL(Element) dx;
};

// g = w * dy, and r.
template <bool whole>
INLINE void products8(Backward row, uint at, uint width, LOCAL(float) g, LOCAL(float) r) {
    float w[8];
    take8<whole>(row.dy, at, width, g);
    take8<whole>(row.residual, at, width, r);
    take8<whole>(row.weight, at, width, w);
    UNROLL for (uint i = 0; i < 8; ++i) g[i] *= w[i];
}

// g = a * g - b * r
INLINE void subtract8(LOCAL(float) g, LOCAL(const float) r, float a, float b) {
    UNROLL for (uint i = 0; i < 8; ++i) g[i] = a * g[i] - b * r[i];
}

template <bool whole>
INLINE void backward(Backward row, float rstd, GIVEN(RmsNormParameters) p, Worker worker) {
    const uint first = worker.index * 8, step = worker.count * 8;
    float g[KEPT][8], r[KEPT][8], dot = 0.0f;
    UNROLL for (uint c = 0; c < KEPT; ++c) products8<whole>(row, first + c * step, p.width, g[c], r[c]);
    UNROLL for (uint c = 0; c < KEPT; ++c) dot += dot8(g[c], r[c]);
    for (uint at = first + KEPT * step; at < p.width; at += step) {
        float g_[8], r_[8];
        products8<whole>(row, at, p.width, g_, r_);
        dot += dot8(g_, r_);
    }
    // On its way while the block adds up.
    float dresidual[KEPT][8];
    if (p.add) UNROLL for (uint c = 0; c < KEPT; ++c) take8<whole>(row.dresidual, first + c * step, p.width, dresidual[c]);
    dot = block_sum(dot, worker.sums, worker.index, worker.count);
    const float k = rstd * rstd * rstd * dot / float(p.width);

    UNROLL for (uint c = 0; c < KEPT; ++c) subtract8(g[c], r[c], rstd, k);
    if (p.add) UNROLL for (uint c = 0; c < KEPT; ++c) subtract8(g[c], dresidual[c], 1.0f, -1.0f);
    UNROLL for (uint c = 0; c < KEPT; ++c) put8<whole>(row.dx, first + c * step, p.width, g[c]);
    for (uint at = first + KEPT * step; at < p.width; at += step) {
        float g_[8], r_[8];
        products8<whole>(row, at, p.width, g_, r_);
        subtract8(g_, r_, rstd, k);
        if (p.add) {
            take8<whole>(row.dresidual, at, p.width, r_);
            subtract8(g_, r_, 1.0f, -1.0f);
        }
        put8<whole>(row.dx, at, p.width, g_);
    }
}

KERNEL(rms_norm_backward, 384, IN(0, Element, dy), IN(1, Element, residual), IN(2, float, rstd),
       IN(3, Element, weight), IN(4, Element, dresidual), OUT(5, Element, dx), PARAMETERS(6, RmsNormParameters, p)) {
    SHARED(float, sums, 32);
    const index_t at = index_t(BLOCK_X) * p.width;
    const Backward row = {dy + at, residual + at, weight, dresidual + at, dx + at};
    const Worker worker = {THREAD, THREADS, sums};
    if (p.aligned) backward<true>(row, rstd[BLOCK_X], p, worker);
    else backward<false>(row, rstd[BLOCK_X], p, worker);
}
