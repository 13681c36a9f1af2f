// Softmax cross-entropy over the vocabulary, logits [rows, vocab] (src/ops/cross_entropy.rs):
//
//   z       = scale * logits
//   lse     = log(sum(exp(z)))
//   nll     = lse - z[label]
//   dlogits = dloss * scale * (exp(z - lse) - onehot(label))     in the logits' place
//
// The logits' address must be a multiple of 16 bytes. A row of an odd vocabulary starts anywhere: it is cut into chunks
// of 8 at multiples of 8 of the whole matrix, of which the row's first and last may have fewer. The host holds the labels
// under vocab.

struct CrossEntropyParameters {
    uint rows, vocab;
    float scale, dloss;
};

// Chunk `index` of a row: columns [from, from + count), none behind the last.
struct Chunk {
    uint from, count;
};

INLINE Chunk chunk_of(uint index, uint shift, uint vocab) {
    const uint from = index == 0 ? 0 : index * 8 - shift, to = index * 8 + 8 - shift;
    const uint end = to < vocab ? to : vocab;
    Chunk chunk = {from, from < end ? end - from : 0};
    return chunk;
}

// Starts a maximum. Not minus infinity: its difference with itself is no number, and Metal's fast maths has none.
#define LOWEST (-1e38f)
#define TOGETHER 2

// grid: (rows, 1, 1), threads: 512 (1024 where there are fewer rows than a GPU's multiprocessors)
KERNEL(cross_entropy_forward, 1024, IN(0, Element, logits), IN(1, uint, labels), OUT(2, float, nll), OUT(3, float, lse),
       PARAMETERS(4, CrossEntropyParameters, p)) {
    SHARED(float, maxima, 32);
    SHARED(float, sums, 32);
    const index_t row = index_t(BLOCK_X) * p.vocab;
    const uint shift = uint(row % 8), chunks = (p.vocab + shift + 7) / 8;
    float maximum = LOWEST, sum = 0.0f;
    for (uint first = THREAD; first < chunks; first += TOGETHER * THREADS) {
        float z[TOGETHER][8];
        uint count[TOGETHER];
        UNROLL for (uint c = 0; c < TOGETHER; ++c) {
            const Chunk chunk = chunk_of(first + c * THREADS, shift, p.vocab);
            count[c] = chunk.count;
            load8(logits, row + chunk.from, chunk.count, true, z[c]);
        }
        float next = maximum;
        UNROLL for (uint c = 0; c < TOGETHER; ++c) UNROLL for (uint i = 0; i < 8; ++i) {
            z[c][i] = i < count[c] ? p.scale * z[c][i] : LOWEST;
            next = max_(next, z[c][i]);
        }
        sum *= exp_(maximum - next);
        UNROLL for (uint c = 0; c < TOGETHER; ++c) UNROLL for (uint i = 0; i < 8; ++i) sum += exp_(z[c][i] - next);
        maximum = next;
    }
    // The warp's, then the block's.
    float top = warp_max(maximum);
    sum = warp_sum(sum * exp_(maximum - top));
    if (LANE == 0) {
        maxima[WARP] = top;
        sums[WARP] = sum;
    }
    BARRIER();
    const bool has = LANE < THREADS / 32;
    maximum = has ? maxima[LANE] : LOWEST;
    top = warp_max(maximum);
    sum = warp_sum(has ? sums[LANE] * exp_(maximum - top) : 0.0f);
    if (THREAD == 0) {
        const float all = top + log_(sum);
        lse[BLOCK_X] = all;
        nll[BLOCK_X] = all - p.scale * wide(logits[row + labels[BLOCK_X]]);
    }
}

// grid: (rows, ceil((vocab + 7) / (8 * TOGETHER * threads)), 1), threads: 256
KERNEL(cross_entropy_backward, 256, OUT(0, Element, logits), IN(1, uint, labels), IN(2, float, lse),
       PARAMETERS(3, CrossEntropyParameters, p)) {
    const index_t row = index_t(BLOCK_X) * p.vocab;
    const uint shift = uint(row % 8), label = labels[BLOCK_X];
    const float all = lse[BLOCK_X], factor = p.dloss * p.scale;
    UNROLL for (uint c = 0; c < TOGETHER; ++c) {
        const Chunk chunk = chunk_of((BLOCK_Y * TOGETHER + c) * THREADS + THREAD, shift, p.vocab);
        float z[8];
        load8(logits, row + chunk.from, chunk.count, true, z);
        UNROLL for (uint i = 0; i < 8; ++i)
            z[i] = factor * (exp_(p.scale * z[i] - all) - (chunk.from + i == label ? 1.0f : 0.0f));
        store8(logits, row + chunk.from, chunk.count, true, z);
    }
}
