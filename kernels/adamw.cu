// AdamW on f32 parameters (src/ops/adamw/mod.rs), with the gradient's norm brought down to max_norm:
//
//   norm  = sqrt(sum of partials)         partials: sums of squares of the gradient, of adamw_norm
//   clip  = max_norm > 0 ? min(1, max_norm / (norm + 1e-6)) : 1
//   g     = clip * gradient
//   m     = beta1 m + (1 - beta1) g
//   v     = beta2 v + (1 - beta2) g^2
//   value = keep value - rate m / (sqrt(v) / root + eps)
//
// keep = 1 - lr * weight_decay, rate = lr / (1 - beta1^step), root = sqrt(1 - beta2^step). Addresses must be multiples
// of 16 bytes. The order of every sum is fixed by the grid.
//
// grid: (partials, 1, 1) for both, any number up to ceil(count / (8 * threads)): a block goes on with every partials-th
// slab of 8 * threads elements. threads: 256

struct AdamWParameters {
    uint count, partials;
    float keep, beta1, beta2, eps, rate, root, max_norm;
};

INLINE float square8(LOCAL(const float) x) {
    float sum = 0.0f;
    UNROLL for (uint i = 0; i < 8; ++i) sum += x[i] * x[i];
    return sum;
}

// partials has one element a block.
KERNEL(adamw_norm, 256, IN(0, float, x), OUT(1, float, partials), PARAMETERS(2, AdamWParameters, p)) {
    SHARED(float, sums, 32);
    const index_t step = index_t(p.partials) * THREADS * 8;
    float sum = 0.0f;
    for (index_t at = (index_t(BLOCK_X) * THREADS + THREAD) * 8; at < p.count; at += step) {
        float values[8];
        load8(x, at, p.count - uint(at), true, values);
        sum += square8(values);
    }
    sum = block_sum(sum, sums, THREAD, THREADS);
    if (THREAD == 0) partials[BLOCK_X] = sum;
}

// value_partials has one element a block: the sum of squares of its new values.
KERNEL(adamw_step, 256, IN(0, float, value), IN(1, float, m), IN(2, float, v), IN(3, float, gradient),
       IN(4, float, partials), OUT(5, float, new_value), OUT(6, float, new_m), OUT(7, float, new_v),
       OUT(8, float, value_partials), PARAMETERS(9, AdamWParameters, p)) {
    SHARED(float, sums, 32);
    float clip = 1.0f;
    if (p.max_norm > 0.0f) {
        float square = 0.0f;
        for (uint i = THREAD; i < p.partials; i += THREADS) square += partials[i];
        clip = min_(1.0f, p.max_norm / (sqrt_(block_sum(square, sums, THREAD, THREADS)) + 1e-6f));
    }
    const index_t step = index_t(p.partials) * THREADS * 8;
    float sum = 0.0f;
    for (index_t at = (index_t(BLOCK_X) * THREADS + THREAD) * 8; at < p.count; at += step) {
        const uint left = p.count - uint(at);
        float x[8], first[8], second[8], g[8];
        load8(value, at, left, true, x);
        load8(m, at, left, true, first);
        load8(v, at, left, true, second);
        load8(gradient, at, left, true, g);
        UNROLL for (uint i = 0; i < 8; ++i) {
            g[i] *= clip;
            first[i] = p.beta1 * first[i] + (1.0f - p.beta1) * g[i];
            second[i] = p.beta2 * second[i] + (1.0f - p.beta2) * g[i] * g[i];
            // Behind the end both are 0, and eps may be.
            const float change = i < left ? first[i] / (sqrt_(second[i]) / p.root + p.eps) : 0.0f;
            x[i] = p.keep * x[i] - p.rate * change;
        }
        store8(new_value, at, left, true, x);
        store8(new_m, at, left, true, first);
        store8(new_v, at, left, true, second);
        sum += square8(x);
    }
    sum = block_sum(sum, sums, THREAD, THREADS);
    if (THREAD == 0) value_partials[BLOCK_X] = sum;
}
