// SwiGLU on gate and up side by side, gate_up [rows, 2 width] (src/ops/swiglu.rs):
//
//   a     = g * sigmoid(g) * up
//   dgate = scale * da * up * sigmoid(g) * (1 + g * (1 - sigmoid(g)))
//   dup   = scale * da * g * sigmoid(g)
//
// grid: (rows, ceil(width / (8 * threads)), 1), threads: 256, or width / 8 rounded up to a multiple of 32 where less

struct SwigluParameters {
    uint rows, width;
    float scale;
    uint aligned;
};

INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_(-x)); }

KERNEL(swiglu_forward, 256, IN(0, Element, gate_up), OUT(1, Element, a), PARAMETERS(2, SwigluParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.width) return;
    const bool aligned = p.aligned != 0;
    const index_t row = index_t(BLOCK_X) * p.width, gate = 2 * row + at;
    float g[8], up[8];
    load8(gate_up, gate, p.width - at, aligned, g);
    load8(gate_up, gate + p.width, p.width - at, aligned, up);
    UNROLL for (uint i = 0; i < 8; ++i) g[i] *= sigmoid(g[i]) * up[i];
    store8(a, row + at, p.width - at, aligned, g);
}

KERNEL(swiglu_backward, 256, IN(0, Element, da), IN(1, Element, gate_up), OUT(2, Element, dgate_up),
       PARAMETERS(3, SwigluParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.width) return;
    const bool aligned = p.aligned != 0;
    const index_t row = index_t(BLOCK_X) * p.width, gate = 2 * row + at;
    float d[8], g[8], up[8];
    load8(da, row + at, p.width - at, aligned, d);
    load8(gate_up, gate, p.width - at, aligned, g);
    load8(gate_up, gate + p.width, p.width - at, aligned, up);
    UNROLL for (uint i = 0; i < 8; ++i) {
        const float s = sigmoid(g[i]), silu = g[i] * s, da_ = p.scale * d[i];
        g[i] = da_ * up[i] * s * (1.0f + g[i] * (1.0f - s));
        up[i] = da_ * silu;
    }
    store8(dgate_up, gate, p.width - at, aligned, g);
    store8(dgate_up, gate + p.width, p.width - at, aligned, up);
}
