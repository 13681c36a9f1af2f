// Gated norm of each group of columns (src/ops/gated_norm/mod.rs):
//
//   g    = y * silu(z)              rstd = 1 / sqrt(mean(g^2) + eps)              n = w * g * rstd
//   dg   = rstd * (w * dn - g * rstd^2 * mean(w * dn * g))
//   dy   = dg * silu(z)             dz = dg * y * sigmoid(z) * (1 + z * (1 - sigmoid(z)))
//
// A block makes one group of a row, and reads it twice.
//
// grid: (rows * groups, 1, 1), threads: width / 8 rounded up to a multiple of 32, at most 256

struct GatedNormParameters {
    // Of a group.
    uint width;
    uint groups;
    float eps;
    uint aligned;
};

INLINE float sigmoid(float x) { return reciprocal_(1.0f + exp_(-x)); }

// y * silu(z) of 8 columns.
INLINE void gate8(GLOBAL(const Element) y, GLOBAL(const Element) z, uint at, GIVEN(GatedNormParameters) p, LOCAL(float) g) {
    float gate[8];
    load8(y, at, p.width - at, p.aligned != 0, g);
    load8(z, at, p.width - at, p.aligned != 0, gate);
    UNROLL for (uint i = 0; i < 8; ++i) g[i] *= gate[i] * sigmoid(gate[i]);
}

KERNEL(gated_norm_forward, 256, IN(0, Element, y), IN(1, Element, z), IN(2, float, weight), OUT(3, Element, normed),
       OUT(4, float, rstd), PARAMETERS(5, GatedNormParameters, p)) {
    SHARED(float, sums, 32);
    const index_t first = index_t(BLOCK_X) * p.width;
    float square = 0.0f;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8) {
        float g[8];
        gate8(y + first, z + first, at, p, g);
        UNROLL for (uint i = 0; i < 8; ++i) square += g[i] * g[i];
    }
    square = block_sum(square, sums, THREAD, THREADS);
    const float s = rsqrt_(square / float(p.width) + p.eps);
    const index_t column = index_t(BLOCK_X % p.groups) * p.width;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8) {
        float g[8], w[8];
        gate8(y + first, z + first, at, p, g);
        load8(weight, column + at, p.width - at, p.aligned != 0, w);
        UNROLL for (uint i = 0; i < 8; ++i) g[i] *= w[i] * s;
        store8(normed, first + at, p.width - at, p.aligned != 0, g);
    }
    if (THREAD == 0) rstd[BLOCK_X] = s;
}

// w * dn of 8 columns.
INLINE void weighted8(GLOBAL(const Element) dn, GLOBAL(const float) weight, uint at, GIVEN(GatedNormParameters) p,
                      LOCAL(float) t) {
    float w[8];
    load8(dn, at, p.width - at, p.aligned != 0, t);
    load8(weight, at, p.width - at, p.aligned != 0, w);
    UNROLL for (uint i = 0; i < 8; ++i) t[i] *= w[i];
}

KERNEL(gated_norm_backward, 256, IN(0, Element, dn), IN(1, Element, y), IN(2, Element, z), IN(3, float, rstd),
       IN(4, float, weight), OUT(5, Element, dy), OUT(6, Element, dz), PARAMETERS(7, GatedNormParameters, p)) {
    SHARED(float, sums, 32);
    const index_t first = index_t(BLOCK_X) * p.width, column = index_t(BLOCK_X % p.groups) * p.width;
    float dot = 0.0f;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8) {
        float t[8], g[8];
        weighted8(dn + first, weight + column, at, p, t);
        gate8(y + first, z + first, at, p, g);
        UNROLL for (uint i = 0; i < 8; ++i) dot += t[i] * g[i];
    }
    dot = block_sum(dot, sums, THREAD, THREADS);
    const float s = rstd[BLOCK_X], k = s * s * s * dot / float(p.width);
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8) {
        const uint left = p.width - at;
        float t[8], u[8], gate[8];
        weighted8(dn + first, weight + column, at, p, t);
        load8(y, first + at, left, p.aligned != 0, u);
        load8(z, first + at, left, p.aligned != 0, gate);
        UNROLL for (uint i = 0; i < 8; ++i) {
            const float sigma = sigmoid(gate[i]), silu = gate[i] * sigma;
            const float dg = s * t[i] - k * u[i] * silu;
            t[i] = dg * silu;
            u[i] = dg * u[i] * sigma * (1.0f + gate[i] * (1.0f - sigma));
        }
        store8(dy, first + at, left, p.aligned != 0, t);
        store8(dz, first + at, left, p.aligned != 0, u);
    }
}
