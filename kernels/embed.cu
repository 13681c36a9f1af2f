// Embedding lookup over the vocabulary and the soft prompts (src/ops/embed/mod.rs):
//
//   x[t]        = multiplier * embedding[ids[t]]                    a token
//   x[t]        = multiplier * prompts[j]                           ids[t] == VIRTUAL | j: a virtual token
//   dprompts[j] = multiplier * sum of dx[t] over the t with ids[t] == VIRTUAL | j, in order of t
//
// The host checks that the ids are in the matrix that they name.

// As `VIRTUAL` in src/ops/embed/mod.rs.
#define VIRTUAL (1u << 31)

struct EmbedParameters {
    uint rows, width;
    float multiplier;
    uint aligned;
};

// grid: (rows, 1, 1), threads: width / 8 rounded up to a multiple of 32, at most 256
KERNEL(embed_forward, 256, IN(0, Element, embedding), IN(1, float, prompts), IN(2, uint, ids), OUT(3, Element, x),
       PARAMETERS(4, EmbedParameters, p)) {
    const uint id = ids[BLOCK_X];
    const bool token = (id & VIRTUAL) == 0, aligned = p.aligned != 0;
    const index_t from = index_t(id & ~VIRTUAL) * p.width, to = index_t(BLOCK_X) * p.width;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8) {
        float values[8];
        if (token) load8(embedding, from + at, p.width - at, aligned, values);
        else load8(prompts, from + at, p.width - at, aligned, values);
        UNROLL for (uint i = 0; i < 8; ++i) values[i] *= p.multiplier;
        store8(x, to + at, p.width - at, aligned, values);
    }
}

// A block makes 8 * threads columns of one virtual token's gradient. Its threads look for the token's rows together, 32
// rows a thread, then each adds up its 8 columns of the rows found.
// grid: (virtual_tokens, ceil(width / (8 * threads)), 1), threads: 128
KERNEL(embed_backward, 256, IN(0, Element, dx), IN(1, uint, ids), OUT(2, float, dprompts),
       PARAMETERS(3, EmbedParameters, p)) {
    SHARED(uint, found, 256);
    const uint wanted = VIRTUAL | BLOCK_X, at = (BLOCK_Y * THREADS + THREAD) * 8;
    const uint left = at < p.width ? p.width - at : 0;
    float sum[8];
    UNROLL for (uint i = 0; i < 8; ++i) sum[i] = 0.0f;
    for (uint tile = 0; tile < p.rows; tile += 32 * THREADS) {
        const uint first = tile + 32 * THREAD;
        uint mask = 0;
        for (uint i = 0; i < 32 && first + i < p.rows; ++i) mask |= ids[first + i] == wanted ? 1u << i : 0u;
        found[THREAD] = mask;
        BARRIER();
        for (uint group = 0; group < THREADS; ++group) {
            uint rows = found[group];
            for (uint row = tile + 32 * group; rows != 0; rows >>= 1, ++row) {
                if ((rows & 1) == 0) continue;
                float values[8];
                load8(dx, index_t(row) * p.width + at, left, p.aligned != 0, values);
                UNROLL for (uint i = 0; i < 8; ++i) sum[i] += values[i];
            }
        }
        BARRIER();
    }
    UNROLL for (uint i = 0; i < 8; ++i) sum[i] *= p.multiplier;
    store8(dprompts, index_t(BLOCK_X) * p.width + at, left, p.aligned != 0, sum);
}
