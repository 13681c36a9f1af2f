// SwiGLU on gate and up side by side, gate_up [rows, 2 width] (src/ops/swiglu/mod.rs):
//
//   a     = g * sigmoid(g) * up
//   dgate = da * up * sigmoid(g) * (1 + g * (1 - sigmoid(g)))
//   dup   = da * g * sigmoid(g)
//
// grid: (rows, ceil(width / (8 * threads)), 1), threads: a multiple of 32, at most 256: width / 8 rounded
// up if that is at most 256, else the number that leaves the fewest of a row's threads without columns

struct SwigluParameters {
    uint rows, width;
    uint aligned;
};

INLINE float sigmoid(float x) { return reciprocal_(1.0f + exp_(-x)); }

// With `whole` 8 columns are left and on 16-byte boundaries.
template <bool whole>
INLINE void forward8(GLOBAL(const Element) gate, GLOBAL(Element) a, uint width, uint left) {
    const uint count = whole ? 8 : left;
    float g[8], up[8];
    load8(gate, 0, count, whole, g);
    load8(gate, width, count, whole, up);
    UNROLL for (uint i = 0; i < 8; ++i) g[i] *= sigmoid(g[i]) * up[i];
    store8(a, 0, count, whole, g);
}

KERNEL(swiglu_forward, 256, IN(0, Element, gate_up), OUT(1, Element, a), PARAMETERS(2, SwigluParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.width) return;
    const index_t row = index_t(BLOCK_X) * p.width;
    if (p.aligned) forward8<true>(gate_up + (2 * row + at), a + (row + at), p.width, 8);
    else forward8<false>(gate_up + (2 * row + at), a + (row + at), p.width, p.width - at);
}

// Where the 8 columns begin in each matrix.
struct Backward {
    GLOBAL(const Element) da;
    GLOBAL(const Element) gate;
    GLOBAL(Element) dgate;
};

template <bool whole>
INLINE void backward8(Backward to, GIVEN(SwigluParameters) p, uint left) {
    const uint count = whole ? 8 : left;
    float d[8], g[8], up[8];
    load8(to.da, 0, count, whole, d);
    load8(to.gate, 0, count, whole, g);
    load8(to.gate, p.width, count, whole, up);
    UNROLL for (uint i = 0; i < 8; ++i) {
        const float s = sigmoid(g[i]), silu = g[i] * s;
        g[i] = d[i] * up[i] * s * (1.0f + g[i] * (1.0f - s));
        up[i] = d[i] * silu;
    }
    store8(to.dgate, 0, count, whole, g);
    store8(to.dgate, p.width, count, whole, up);
}

KERNEL(swiglu_backward, 256, IN(0, Element, da), IN(1, Element, gate_up), OUT(2, Element, dgate_up),
       PARAMETERS(3, SwigluParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.width) return;
    const index_t row = index_t(BLOCK_X) * p.width;
    const Backward to = {da + (row + at), gate_up + (2 * row + at), dgate_up + (2 * row + at)};
    if (p.aligned) backward8<true>(to, p, 8);
    else backward8<false>(to, p, p.width - at);
}
