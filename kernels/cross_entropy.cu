// Softmax cross-entropy over the vocabulary, logits [rows, stride], whose first `vocab` columns are tokens
// (src/ops/cross_entropy/mod.rs):
//
//   z       = scale * logits
//   lse     = log(sum(exp(z)))
//   nll     = lse - z[label]
//   dlogits = dloss * scale * (exp(z - lse) - onehot(label))     in the logits' place, and 0 after column vocab;
//                                                                dloss of the row if per_row, else one for all rows
//
// The logits' address must be a multiple of 16 bytes. A row of an odd stride starts anywhere: it is a head of up
// to 7 columns, chunks of 8 on 16-byte boundaries, and a tail of up to 7. The host holds the labels under vocab.

struct CrossEntropyParameters {
    uint rows, vocab, stride, per_row;
    float scale, dloss;
};

// Chunks whose loads are on their way together.
#define TOGETHER 2
// Starts a maximum. Not minus infinity: its difference with itself is no number, and Metal's fast maths has none.
#define LOWEST (-1e38f)

// Columns [head, head + 8 * chunks) are chunks.
struct Cut {
    uint head, chunks, tail;
};

INLINE Cut cut(index_t row, uint vocab) {
    const uint to_boundary = uint(8 - row % 8) % 8, head = to_boundary < vocab ? to_boundary : vocab;
    Cut c = {head, (vocab - head) / 8, (vocab - head) % 8};
    return c;
}

// The column of the head or tail that a thread does alone: of the head threads 0 to 6, of the tail 8 to 14. `vocab` for
// the other threads.
INLINE uint edge(Cut c, uint worker, uint vocab) {
    if (worker < c.head) return worker;
    return worker >= 8 && worker - 8 < c.tail ? vocab - c.tail + worker - 8 : vocab;
}

// The maximum of the logits so far, and the sum of exp(z - maximum).
struct Running {
    float maximum, sum;
};

INLINE Running seen8(Running now, LOCAL(const float) z) {
    float next = now.maximum;
    UNROLL for (uint i = 0; i < 8; ++i) next = max_(next, z[i]);
    now.sum *= exp_(now.maximum - next);
    UNROLL for (uint i = 0; i < 8; ++i) now.sum += exp_(z[i] - next);
    now.maximum = next;
    return now;
}

// grid: (rows, 1, 1), threads: 512
KERNEL(cross_entropy_forward, 1024, IN(0, Element, logits), IN(1, uint, labels), OUT(2, float, nll),
       OUT(3, float, lse), PARAMETERS(4, CrossEntropyParameters, p)) {
    SHARED(float, maxima, 32);
    SHARED(float, sums, 32);
    const index_t row = index_t(BLOCK_X) * p.stride;
    const Cut c = cut(row, p.vocab);
    Running now = {LOWEST, 0.0f};
    for (uint first = THREAD; first < c.chunks; first += TOGETHER * THREADS) {
        float z[TOGETHER][8];
        // Behind the last chunk the first is read again, so that no branch stands between the loads.
        UNROLL for (uint i = 0; i < TOGETHER; ++i) {
            const uint chunk = first + i * THREADS;
            load8(logits, row + c.head + 8 * (chunk < c.chunks ? chunk : 0), 8, true, z[i]);
        }
        UNROLL for (uint i = 0; i < TOGETHER; ++i) {
            const bool inside = first + i * THREADS < c.chunks;
            UNROLL for (uint j = 0; j < 8; ++j) z[i][j] = inside ? p.scale * z[i][j] : LOWEST;
            now = seen8(now, z[i]);
        }
    }
    const uint alone = edge(c, THREAD, p.vocab);
    if (alone < p.vocab) {
        const float z = p.scale * wide(logits[row + alone]), next = max_(now.maximum, z);
        now.sum = now.sum * exp_(now.maximum - next) + exp_(z - next);
        now.maximum = next;
    }
    // The warp's, then the block's.
    float top = warp_max(now.maximum), sum = warp_sum(now.sum * exp_(now.maximum - top));
    if (LANE == 0) {
        maxima[WARP] = top;
        sums[WARP] = sum;
    }
    BARRIER();
    const bool has = LANE < THREADS / 32;
    const float maximum = has ? maxima[LANE] : LOWEST;
    top = warp_max(maximum);
    sum = warp_sum(has ? sums[LANE] * exp_(maximum - top) : 0.0f);
    if (THREAD == 0) {
        const float all = top + log_(sum);
        lse[BLOCK_X] = all;
        nll[BLOCK_X] = all - p.scale * wide(logits[row + labels[BLOCK_X]]);
    }
}

// grid: (rows, ceil(vocab / (8 * TOGETHER * threads)), 1), threads: 256
KERNEL(cross_entropy_backward, 256, OUT(0, Element, logits), IN(1, uint, labels), IN(2, float, lse),
       IN(3, float, dloss), PARAMETERS(4, CrossEntropyParameters, p)) {
    const index_t row = index_t(BLOCK_X) * p.stride;
    const Cut c = cut(row, p.vocab);
    const uint label = labels[BLOCK_X], first = BLOCK_Y * TOGETHER * THREADS + THREAD;
    const float all = lse[BLOCK_X], factor = (p.per_row ? dloss[BLOCK_X] : p.dloss) * p.scale;
    float z[TOGETHER][8];
    UNROLL for (uint i = 0; i < TOGETHER; ++i) {
        const uint chunk = first + i * THREADS;
        if (chunk < c.chunks) load8(logits, row + c.head + 8 * chunk, 8, true, z[i]);
    }
    UNROLL for (uint i = 0; i < TOGETHER; ++i) {
        const uint chunk = first + i * THREADS, column = c.head + 8 * chunk;
        if (chunk >= c.chunks) continue;
        UNROLL for (uint j = 0; j < 8; ++j)
            z[i][j] = factor * (exp_(p.scale * z[i][j] - all) - (column + j == label ? 1.0f : 0.0f));
        store8(logits, row + column, 8, true, z[i]);
    }
    const uint alone = BLOCK_Y == 0 ? edge(c, THREAD, p.vocab) : p.vocab;
    if (alone < p.vocab) {
        const float e = exp_(p.scale * wide(logits[row + alone]) - all);
        logits[row + alone] = narrow(factor * (e - (alone == label ? 1.0f : 0.0f)));
    }
    if (BLOCK_Y > 0) return;
    for (uint column = p.vocab + THREAD; column < p.stride; column += THREADS) logits[row + column] = narrow(0.0f);
}
