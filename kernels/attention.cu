// Shared-prefix attention: src/ops/attention/mod.rs has the formula, src/ops/attention/gpu/plan.rs what `visible`,
// `tiles`, `key_items` and `reductions` hold.
//
// Nothing of the size of the scores is stored: a block of the forward pass reads its queries' keys with a running
// maximum and sum (arXiv:2205.14135, algorithm 1); the backward kernels recompute the probabilities from `lse`
// (algorithm 4). dQ has blocks by queries, dK and dV by keys, so that each sum has one owner.
//
// Each kernel comes in three sizes, for heads of up to 64, 128 and 256 elements; its tiles in shared memory are 32,
// 16 or 8 rows of a head, widened to floats.

struct AttentionParameters {
    uint heads, kv_heads, head_dim;
    uint q_width, kv_width, kv_column, prefix_width, prefix_column, queries;
    float scale;
    uint dq_width, dkv_width, dkv_column, aligned, rotated;
};

struct AttentionReduceParameters {
    uint key_tile, width, dkv_width, dkv_column, to_prefix, aligned, rotated, head_dim;
};

#define BLOCK 128
// A score that no key has; finite, since Metal's compiler may take infinities for impossible.
#define MASKED (-1e30f)

template <uint N>
struct Size {
    enum : uint {
        rows = 2048 / N,
        few = 1024 / N,
        // Floats from row to row: 16-byte accesses to neighbouring rows go to different banks.
        stride = N + 4,
        // Threads that share a row of scores in the softmax.
        lanes = N / 16
    };
};

// How the threads of a block share a tile of scores: a thread has `rows` x `columns` of them, `down` and `across`
// apart. Of a tile of fewer rows than `down` only the first threads' scores are stored.
template <uint ROWS, uint COLUMNS>
struct Share {
    enum : uint {
        across = COLUMNS < 16 ? COLUMNS : 16,
        down = BLOCK / across,
        rows = ROWS < down ? 1 : ROWS / down,
        columns = COLUMNS / across,
        stride = COLUMNS + 4
    };
};

// What the backward kernels read; the forward kernel has no last three.
struct Inputs {
    GLOBAL(const Element) q;
    GLOBAL(const Element) kv;
    GLOBAL(const Element) prefix;
    GLOBAL(const uint) visible;
    GLOBAL(const Element) dout;
    GLOBAL(const float) lse;
    GLOBAL(const float) delta;
};

// Some rows of one head.
struct Rows {
    GLOBAL(const Element) matrix;
    uint width, column, first, count;
};

// Rows of keys and of values.
struct KeyRows {
    Rows keys, values;
};

INLINE uint smaller(uint a, uint b) { return a < b ? a : b; }

INLINE bool vectors(GIVEN(AttentionParameters) p) { return p.aligned != 0 && p.head_dim % 8 == 0; }

// Of 8 columns from `column` on, those that a head has.
INLINE uint columns_left(uint head_dim, uint column) { return column < head_dim ? smaller(8, head_dim - column) : 0; }

// Rows of own keys, or of a prefix's.
INLINE KeyRows key_rows(Inputs in, GIVEN(AttentionParameters) p, bool own, uint kv_head, uint first, uint count) {
    KeyRows rows;
    rows.keys.matrix = own ? in.kv : in.prefix;
    rows.keys.width = own ? p.kv_width : p.prefix_width;
    rows.keys.column = (own ? p.kv_column : p.prefix_column) + kv_head * p.head_dim;
    rows.keys.first = first;
    rows.keys.count = count;
    rows.values = rows.keys;
    rows.values.column += p.kv_heads * p.head_dim;
    return rows;
}

INLINE Rows query_rows(GLOBAL(const Element) matrix, GIVEN(AttentionParameters) p, uint width, uint head, uint first,
                       uint count) {
    Rows rows;
    rows.matrix = matrix;
    rows.width = width;
    rows.column = head * p.head_dim;
    rows.first = first;
    rows.count = count;
    return rows;
}

// Rows of a head as floats, with zeros for missing rows and columns.
template <uint N, uint ROWS>
INLINE void load_tile(GROUP(float) to, Rows from, GIVEN(AttentionParameters) p, uint id) {
    UNROLL for (uint i = 0; i < ROWS * (N / 8) / BLOCK; ++i) {
        const uint row = id / (N / 8) + BLOCK / (N / 8) * i, column = id % (N / 8) * 8;
        const uint left = row < from.count ? columns_left(p.head_dim, column) : 0;
        float values[8];
        load8(from.matrix, (index_t)(from.first + row) * from.width + from.column + column, left, vectors(p), values);
        UNROLL for (uint j = 0; j < 8; ++j) to[row * Size<N>::stride + column + j] = values[j];
    }
}

// First own row to which each query attends, and the row after the last; an empty range if there is no query.
INLINE void load_seen(GROUP(uint) to, GLOBAL(const uint) visible, uint first, uint count, uint rows, uint id) {
    if (id < 2 * rows) to[id] = id < 2 * count ? visible[2 * (index_t)first + id] : 0;
}

// `from[query, head]` of some queries; zeros for missing queries.
INLINE void load_column(GROUP(float) to, GLOBAL(const float) from, GIVEN(AttentionParameters) p, uint head, uint first,
                        uint count, uint rows, uint id) {
    if (id < rows) to[id] = id < count ? from[(index_t)(first + id) * p.heads + head] : 0.0f;
}

// This thread's part of a[ROWS, D] times the transpose of b[COLUMNS, D].
template <uint N, uint ROWS, uint COLUMNS>
INLINE void products(GROUP(const float) a, GROUP(const float) b, uint head_dim, uint id, LOCAL(float) out) {
    typedef Share<ROWS, COLUMNS> S;
    const uint row = id / S::across % ROWS, column = id % S::across;
    UNROLL for (uint i = 0; i < S::rows * S::columns; ++i) out[i] = 0.0f;
    for (uint d = 0; d < head_dim; d += 4) {
        float x[S::rows][4], y[S::columns][4];
        UNROLL for (uint i = 0; i < S::rows; ++i)
            UNROLL for (uint e = 0; e < 4; ++e) x[i][e] = a[(row + S::down * i) * Size<N>::stride + d + e];
        UNROLL for (uint j = 0; j < S::columns; ++j)
            UNROLL for (uint e = 0; e < 4; ++e) y[j][e] = b[(column + S::across * j) * Size<N>::stride + d + e];
        UNROLL for (uint i = 0; i < S::rows; ++i)
            UNROLL for (uint j = 0; j < S::columns; ++j)
                UNROLL for (uint e = 0; e < 4; ++e) out[i * S::columns + j] += x[i][e] * y[j][e];
    }
}

// Adds w[rows, COUNT] x[COUNT, D] to `sums`: 8 columns of the rows r and r + few, r = id / (N / 8).
template <uint N, uint COUNT>
INLINE void accumulate(GROUP(const float) w, GROUP(const float) x, uint id, LOCAL(float) sums) {
    const uint row = id / (N / 8), column = id % (N / 8) * 8;
    GROUP(const float) first = w + row * (COUNT + 4);
    GROUP(const float) second = w + (row + Size<N>::few) * (COUNT + 4);
    for (uint k = 0; k < COUNT; k += 4) {
        UNROLL for (uint e = 0; e < 4; ++e) {
            const float a = first[k + e], b = second[k + e];
            UNROLL for (uint c = 0; c < 8; ++c) {
                const float value = x[(k + e) * Size<N>::stride + column + c];
                sums[c] += a * value;
                sums[8 + c] += b * value;
            }
        }
    }
}

template <uint N>
INLINE void multiply_rows(GROUP(const float) factors, uint id, LOCAL(float) sums) {
    const uint row = id / (N / 8);
    const float a = factors[row], b = factors[row + Size<N>::few];
    UNROLL for (uint c = 0; c < 8; ++c) {
        sums[c] *= a;
        sums[8 + c] *= b;
    }
}

// Stores what `accumulate` summed up, times a factor, in the rows that exist; `at` is the first one's first column.
template <uint N, typename T>
INLINE void store_tile(GLOBAL(T) to, index_t at, uint width, uint count, GIVEN(AttentionParameters) p, uint id,
                       LOCAL(const float) sums, float factor) {
    const uint column = id % (N / 8) * 8, left = columns_left(p.head_dim, column);
    UNROLL for (uint i = 0; i < 2; ++i) {
        const uint row = id / (N / 8) + Size<N>::few * i;
        float values[8];
        UNROLL for (uint c = 0; c < 8; ++c) values[c] = factor * sums[8 * i + c];
        if (row < count) store8(to, at + (index_t)row * width + column, left, vectors(p), values);
    }
}

struct ForwardShared {
    GROUP(float) queries;
    GROUP(float) keys;
    GROUP(float) values;
    GROUP(float) scores;
    GROUP(float) factors;
    GROUP(uint) seen;
};

// Replaces rows of scores by the exponentials of their difference from the largest score so far; older sums have to be
// multiplied by `factors`.
template <uint N>
INLINE void softmax(ForwardShared s, uint id, LOCAL(float) largest, LOCAL(float) sum) {
    const uint row = id / Size<N>::lanes, lane = id % Size<N>::lanes;
    GROUP(float) scores = s.scores + row * (Size<N>::rows + 4);
    float top = *largest, total = 0.0f;
    for (uint i = lane; i < Size<N>::rows; i += Size<N>::lanes) top = max_(top, scores[i]);
    UNROLL for (uint mask = Size<N>::lanes / 2; mask; mask /= 2) top = max_(top, shuffle_xor(top, mask));
    for (uint i = lane; i < Size<N>::rows; i += Size<N>::lanes) {
        const float score = scores[i];
        const float e = score > 0.5f * MASKED ? exp_(score - top) : 0.0f;
        scores[i] = e;
        total += e;
    }
    UNROLL for (uint mask = Size<N>::lanes / 2; mask; mask /= 2) total += shuffle_xor(total, mask);
    const float factor = exp_(*largest - top);
    if (lane == 0) s.factors[row] = factor;
    *sum = *sum * factor + total;
    *largest = top;
}

template <uint N>
INLINE void forward(Inputs in, GLOBAL(const uint) tile, GLOBAL(Element) out, GLOBAL(float) lse, GIVEN(AttentionParameters) p,
                    ForwardShared s, uint head, uint id) {
    const uint ROWS = Size<N>::rows;
    typedef Share<ROWS, ROWS> S;
    const uint first = tile[0], count = tile[1] - first, kv_head = head / (p.heads / p.kv_heads);
    load_seen(s.seen, in.visible, first, count, ROWS, id);
    load_tile<N, ROWS>(s.queries, query_rows(in.q, p, p.q_width, head, first, count), p, id);
    float sums[16], largest = MASKED, sum = 0.0f;
    UNROLL for (uint i = 0; i < 16; ++i) sums[i] = 0.0f;
    for (uint own = 0; own < 2; ++own) {
        const uint end = tile[3 + 2 * own];
        for (uint at = tile[2 + 2 * own]; at < end; at += ROWS) {
            const KeyRows rows = key_rows(in, p, own != 0, kv_head, at, smaller(ROWS, end - at));
            load_tile<N, ROWS>(s.keys, rows.keys, p, id);
            load_tile<N, ROWS>(s.values, rows.values, p, id);
            BARRIER();
            float scores[S::rows * S::columns];
            products<N, ROWS, ROWS>(s.queries, s.keys, p.head_dim, id, scores);
            UNROLL for (uint i = 0; i < S::rows * S::columns; ++i) {
                const uint row = id / S::across + S::down * (i / S::columns);
                const uint column = id % S::across + S::across * (i % S::columns);
                if (row >= ROWS) continue;
                const uint key = at + column;
                const bool sees = own ? key >= s.seen[2 * row] && key < s.seen[2 * row + 1] : key < end;
                s.scores[row * S::stride + column] = sees ? p.scale * scores[i] : MASKED;
            }
            BARRIER();
            softmax<N>(s, id, &largest, &sum);
            BARRIER();
            multiply_rows<N>(s.factors, id, sums);
            accumulate<N, ROWS>(s.scores, s.values, id, sums);
            BARRIER();
        }
    }
    const uint row = id / Size<N>::lanes;
    if (id % Size<N>::lanes == 0) {
        s.factors[row] = sum > 0.0f ? 1.0f / sum : 0.0f;
        if (row < count) lse[(index_t)(first + row) * p.heads + head] = largest + log_(sum);
    }
    BARRIER();
    multiply_rows<N>(s.factors, id, sums);
    const uint width = p.heads * p.head_dim;
    store_tile<N>(out, (index_t)first * width + head * p.head_dim, width, count, p, id, sums, 1.0f);
}

struct QueryShared {
    GROUP(float) queries;
    GROUP(float) douts;
    GROUP(float) keys;
    GROUP(float) values;
    GROUP(float) weights;
    GROUP(float) lse;
    GROUP(float) delta;
    GROUP(uint) seen;
};

template <uint N>
INLINE void query_gradients(Inputs in, GLOBAL(const uint) tile, GLOBAL(Element) dq, GIVEN(AttentionParameters) p,
                            QueryShared s, uint head, uint id) {
    const uint ROWS = Size<N>::rows, KEYS = Size<N>::few;
    typedef Share<ROWS, KEYS> S;
    const uint first = tile[0], count = tile[1] - first, kv_head = head / (p.heads / p.kv_heads);
    load_seen(s.seen, in.visible, first, count, ROWS, id);
    load_column(s.lse, in.lse, p, head, first, count, ROWS, id);
    load_column(s.delta, in.delta, p, head, first, count, ROWS, id);
    load_tile<N, ROWS>(s.queries, query_rows(in.q, p, p.q_width, head, first, count), p, id);
    load_tile<N, ROWS>(s.douts, query_rows(in.dout, p, p.heads * p.head_dim, head, first, count), p, id);
    float sums[16];
    UNROLL for (uint i = 0; i < 16; ++i) sums[i] = 0.0f;
    for (uint own = 0; own < 2; ++own) {
        const uint end = tile[3 + 2 * own];
        for (uint at = tile[2 + 2 * own]; at < end; at += KEYS) {
            const KeyRows rows = key_rows(in, p, own != 0, kv_head, at, smaller(KEYS, end - at));
            load_tile<N, KEYS>(s.keys, rows.keys, p, id);
            load_tile<N, KEYS>(s.values, rows.values, p, id);
            BARRIER();
            float scores[S::rows * S::columns], dp[S::rows * S::columns];
            products<N, ROWS, KEYS>(s.queries, s.keys, p.head_dim, id, scores);
            products<N, ROWS, KEYS>(s.douts, s.values, p.head_dim, id, dp);
            UNROLL for (uint i = 0; i < S::rows * S::columns; ++i) {
                const uint row = id / S::across + S::down * (i / S::columns);
                const uint column = id % S::across + S::across * (i % S::columns);
                if (row >= ROWS) continue;
                const uint key = at + column;
                const bool sees = own ? key >= s.seen[2 * row] && key < s.seen[2 * row + 1] : key < end;
                const float probability = sees && row < count ? exp_(p.scale * scores[i] - s.lse[row]) : 0.0f;
                s.weights[row * S::stride + column] = probability * (dp[i] - s.delta[row]);
            }
            BARRIER();
            accumulate<N, KEYS>(s.weights, s.keys, id, sums);
            BARRIER();
        }
    }
    store_tile<N>(dq, (index_t)first * p.dq_width + head * p.head_dim, p.dq_width, count, p, id, sums, p.scale);
}

struct KeyShared {
    GROUP(float) keys;
    GROUP(float) values;
    GROUP(float) queries;
    GROUP(float) douts;
    GROUP(float) probabilities;
    GROUP(float) weights;
    GROUP(float) lse;
    GROUP(float) delta;
    GROUP(uint) seen;
};

// Adds the share of some queries of one head to the gradients of a tile of keys and values.
template <uint N>
INLINE void add_queries(Inputs in, GIVEN(AttentionParameters) p, KeyShared s, Rows queries, bool own, uint key, uint head,
                        uint id, LOCAL(float) dk, LOCAL(float) dv) {
    const uint ROWS = Size<N>::rows, QUERIES = Size<N>::few;
    typedef Share<ROWS, QUERIES> S;
    const uint first = queries.first, count = queries.count;
    load_seen(s.seen, in.visible, first, count, QUERIES, id);
    load_column(s.lse, in.lse, p, head, first, count, QUERIES, id);
    load_column(s.delta, in.delta, p, head, first, count, QUERIES, id);
    load_tile<N, QUERIES>(s.queries, queries, p, id);
    load_tile<N, QUERIES>(s.douts, query_rows(in.dout, p, p.heads * p.head_dim, head, first, count), p, id);
    BARRIER();
    float scores[S::rows * S::columns], dp[S::rows * S::columns];
    products<N, ROWS, QUERIES>(s.keys, s.queries, p.head_dim, id, scores);
    products<N, ROWS, QUERIES>(s.values, s.douts, p.head_dim, id, dp);
    UNROLL for (uint i = 0; i < S::rows * S::columns; ++i) {
        const uint row = id / S::across + S::down * (i / S::columns);
        const uint column = id % S::across + S::across * (i % S::columns);
        if (row >= ROWS) continue;
        const bool inside = !own || (key + row >= s.seen[2 * column] && key + row < s.seen[2 * column + 1]);
        const float probability = column < count && inside ? exp_(p.scale * scores[i] - s.lse[column]) : 0.0f;
        s.probabilities[row * S::stride + column] = probability;
        s.weights[row * S::stride + column] = probability * (dp[i] - s.delta[column]);
    }
    BARRIER();
    accumulate<N, QUERIES>(s.weights, s.queries, id, dk);
    accumulate<N, QUERIES>(s.probabilities, s.douts, id, dv);
    BARRIER();
}

template <uint N>
INLINE void key_gradients(Inputs in, GLOBAL(const uint) item, GLOBAL(Element) dkv, GLOBAL(float) partials,
                          GIVEN(AttentionParameters) p, KeyShared s, uint kv_head, uint id) {
    const uint ROWS = Size<N>::rows, QUERIES = Size<N>::few;
    const uint key = item[0], count = item[1] - key, end = item[3], source = item[4];
    const KeyRows rows = key_rows(in, p, source != 2, kv_head, key, count);
    load_tile<N, ROWS>(s.keys, rows.keys, p, id);
    load_tile<N, ROWS>(s.values, rows.values, p, id);
    float dk[16], dv[16];
    UNROLL for (uint i = 0; i < 16; ++i) dk[i] = dv[i] = 0.0f;
    const uint group = p.heads / p.kv_heads;
    for (uint head = kv_head * group; head < (kv_head + 1) * group; ++head)
        for (uint at = item[2]; at < end; at += QUERIES) {
            const Rows queries = query_rows(in.q, p, p.q_width, head, at, smaller(QUERIES, end - at));
            add_queries<N>(in, p, s, queries, source != 2, key, head, id, dk, dv);
        }
    const uint column = kv_head * p.head_dim, values = p.kv_heads * p.head_dim;
    if (source == 0) {
        const index_t at = (index_t)key * p.dkv_width + p.dkv_column + column;
        store_tile<N>(dkv, at, p.dkv_width, count, p, id, dk, p.scale);
        store_tile<N>(dkv, at + values, p.dkv_width, count, p, id, dv, 1.0f);
    } else {
        const index_t at = (index_t)item[5] * ROWS * (2 * values) + column;
        store_tile<N>(partials, at, 2 * values, count, p, id, dk, p.scale);
        store_tile<N>(partials, at + values, 2 * values, count, p, id, dv, 1.0f);
    }
}

// Grid: tiles, query heads.
#define FORWARD(N, BLOCKS) \
    KERNEL_FITTING(attention_forward_##N, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, tiles), OUT(5, Element, out), OUT(6, float, lse), \
           PARAMETERS(7, AttentionParameters, p)) { \
        SHARED(float, queries, Size<N>::rows * Size<N>::stride); \
        SHARED(float, keys, Size<N>::rows * Size<N>::stride); \
        SHARED(float, values, Size<N>::rows * Size<N>::stride); \
        SHARED(float, scores, Size<N>::rows * (Size<N>::rows + 4)); \
        SHARED(float, factors, Size<N>::rows); \
        SHARED(uint, seen, 2 * Size<N>::rows); \
        const Inputs in = {q, kv, prefix, visible, q, lse, lse}; \
        const ForwardShared s = {queries, keys, values, scores, factors, seen}; \
        forward<N>(in, tiles + 6 * (index_t)BLOCK_X, out, lse, p, s, BLOCK_Y, THREAD); \
    }

// Grid: tiles, query heads.
#define QUERY_GRADIENTS(N, BLOCKS) \
    KERNEL_FITTING(attention_dq_##N, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, tiles), IN(5, Element, dout), IN(6, float, lse), IN(7, float, delta), \
           OUT(8, Element, dq), PARAMETERS(9, AttentionParameters, p)) { \
        SHARED(float, queries, Size<N>::rows * Size<N>::stride); \
        SHARED(float, douts, Size<N>::rows * Size<N>::stride); \
        SHARED(float, keys, Size<N>::few * Size<N>::stride); \
        SHARED(float, values, Size<N>::few * Size<N>::stride); \
        SHARED(float, weights, Size<N>::rows * (Size<N>::few + 4)); \
        SHARED(float, some_lse, Size<N>::rows); \
        SHARED(float, some_delta, Size<N>::rows); \
        SHARED(uint, seen, 2 * Size<N>::rows); \
        const Inputs in = {q, kv, prefix, visible, dout, lse, delta}; \
        const QueryShared s = {queries, douts, keys, values, weights, some_lse, some_delta, seen}; \
        query_gradients<N>(in, tiles + 6 * (index_t)BLOCK_X, dq, p, s, BLOCK_Y, THREAD); \
    }

// Grid: items of keys, key heads. A block adds up over the query heads of its key head.
#define KEY_GRADIENTS(N, BLOCKS) \
    KERNEL_FITTING(attention_dkv_##N, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, key_items), IN(5, Element, dout), IN(6, float, lse), \
           IN(7, float, delta), OUT(8, Element, dkv), OUT(9, float, partials), \
           PARAMETERS(10, AttentionParameters, p)) { \
        SHARED(float, keys, Size<N>::rows * Size<N>::stride); \
        SHARED(float, values, Size<N>::rows * Size<N>::stride); \
        SHARED(float, queries, Size<N>::few * Size<N>::stride); \
        SHARED(float, douts, Size<N>::few * Size<N>::stride); \
        SHARED(float, probabilities, Size<N>::rows * (Size<N>::few + 4)); \
        SHARED(float, weights, Size<N>::rows * (Size<N>::few + 4)); \
        SHARED(float, some_lse, Size<N>::few); \
        SHARED(float, some_delta, Size<N>::few); \
        SHARED(uint, seen, 2 * Size<N>::few); \
        const Inputs in = {q, kv, prefix, visible, dout, lse, delta}; \
        const KeyShared s = {keys, values, queries, douts, probabilities, weights, some_lse, some_delta, seen}; \
        key_gradients<N>(in, key_items + 6 * (index_t)BLOCK_X, dkv, partials, p, s, BLOCK_Y, THREAD); \
    }

FORWARD(64, 4)
FORWARD(128, 4)
FORWARD(256, 4)
QUERY_GRADIENTS(64, 4)
QUERY_GRADIENTS(128, 4)
QUERY_GRADIENTS(256, 4)
KEY_GRADIENTS(64, 3)
KEY_GRADIENTS(128, 4)
KEY_GRADIENTS(256, 4)

// delta[query, head] = sum of out * dout over the head; 8 threads each. Grid: queries * heads / 16, rounded up.
KERNEL(attention_delta, BLOCK, IN(0, Element, out), IN(1, Element, dout), OUT(2, float, delta),
       PARAMETERS(3, AttentionParameters, p)) {
    const index_t pair = (index_t)BLOCK_X * (BLOCK / 8) + THREAD / 8;
    const bool exists = pair < (index_t)p.queries * p.heads;
    float sum = 0.0f;
    for (uint column = THREAD % 8 * 8; column < p.head_dim; column += 64) {
        const uint left = exists ? columns_left(p.head_dim, column) : 0;
        float x[8], y[8];
        load8(out, pair * p.head_dim + column, left, vectors(p), x);
        load8(dout, pair * p.head_dim + column, left, vectors(p), y);
        UNROLL for (uint i = 0; i < 8; ++i) sum += x[i] * y[i];
    }
    UNROLL for (uint mask = 4; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (exists && THREAD % 8 == 0) delta[pair] = sum;
}

// The sums of 8 columns of a row over its slots.
INLINE void add_slots(GLOBAL(const float) partials, GLOBAL(const uint) reduction, GIVEN(AttentionReduceParameters) p, uint row,
                      uint column, LOCAL(float) sums) {
    UNROLL for (uint i = 0; i < 8; ++i) sums[i] = 0.0f;
    for (uint slot = reduction[2]; slot < reduction[3]; ++slot) {
        float values[8];
        const index_t at = ((index_t)slot * p.key_tile + row) * p.width + column;
        load8(partials, at, columns_left(p.width, column), p.aligned != 0, values);
        UNROLL for (uint i = 0; i < 8; ++i) sums[i] += values[i];
    }
}

// Adds up the slots of some rows, 8 columns a thread. With `rotated` the gradients of keys are rotated back (rope.cu) by their row's
// position: the thread of a head's columns i has those of i + head_dim / 2, a multiple of 8, too. Grid: reductions;
// key_tile * (width / 8, rounded up) / 128, rounded up.
KERNEL(attention_reduce, BLOCK, IN(0, float, partials), IN(1, uint, reductions), IN(2, float, cos), IN(3, float, sin),
       IN(4, uint, positions), OUT(5, Element, dkv), OUT(6, float, dprefix), PARAMETERS(7, AttentionReduceParameters, p)) {
    GLOBAL(const uint) reduction = reductions + 4 * (index_t)BLOCK_X;
    const uint groups = (p.width + 7) / 8, task = BLOCK_Y * BLOCK + THREAD, row = task / groups;
    const uint column = task % groups * 8, left = columns_left(p.width, column), key = reduction[0];
    if (row >= reduction[1] - key) return;
    const index_t to = key + row, place = to * p.dkv_width + p.dkv_column + column;
    const uint half_dim = p.head_dim / 2;
    const bool turned = p.rotated != 0 && column < p.width / 2;
    if (turned && column % p.head_dim >= half_dim) return;
    float sums[8];
    add_slots(partials, reduction, p, row, column, sums);
    if (p.to_prefix) {
        store8(dprefix, to * p.width + column, left, p.aligned != 0, sums);
        return;
    }
    if (turned) {
        float high[8], c[8], s[8];
        add_slots(partials, reduction, p, row, column + half_dim, high);
        const index_t angles = (index_t)positions[to] * half_dim + column % p.head_dim;
        load8(cos, angles, 8, true, c);
        load8(sin, angles, 8, true, s);
        UNROLL for (uint i = 0; i < 8; ++i) {
            const float x = sums[i], y = high[i];
            sums[i] = x * c[i] + y * s[i];
            high[i] = y * c[i] - x * s[i];
        }
        store8(dkv, place + half_dim, 8, p.aligned != 0, high);
    }
    store8(dkv, place, left, p.aligned != 0, sums);
}
