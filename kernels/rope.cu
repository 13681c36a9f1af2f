// Rotary position embedding on the leading heads of each row (src/ops/rope/mod.rs), in place, or on the way to a cache of
// keys and values:
//
//   y[i]       = x[i] cos - sign x[i + D/2] sin        i < D/2, cos and sin of the row's position
//   y[i + D/2] = x[i + D/2] cos + sign x[i] sin        sign -1: the backward pass
//
// The host holds the positions under the table's.

struct RopeParameters {
    uint rows, width, heads, head_dim;
    float sign;
    uint aligned; // of width and head_dim / 2
};

// Turns pairs (a, b) by angles of these cosines and sines.
INLINE void turn_pairs(LOCAL(float) a, LOCAL(float) b, LOCAL(const float) c, LOCAL(const float) s, float sign) {
    UNROLL for (uint i = 0; i < 8; ++i) {
        const float turned = sign * s[i], first = a[i], second = b[i];
        a[i] = first * c[i] - second * turned;
        b[i] = second * c[i] + first * turned;
    }
}

// The row, and its position's row of the tables.
struct Turn {
    GLOBAL(Element) row;
    GLOBAL(const float) cos;
    GLOBAL(const float) sin;
    float sign;
};

// Rotates the pairs at [low, low + left) of the row. With `whole` 8 are left and on 16-byte boundaries.
template <bool whole>
INLINE void turn8(Turn t, uint low, uint at, uint half_dim) {
    const uint left = whole ? 8 : half_dim - at;
    float a[8], b[8], c[8], s[8];
    load8(t.row, low, left, whole, a);
    load8(t.row, low + half_dim, left, whole, b);
    load8(t.cos, at, left, whole, c);
    load8(t.sin, at, left, whole, s);
    turn_pairs(a, b, c, s, t.sign);
    store8(t.row, low, left, whole, a);
    store8(t.row, low + half_dim, left, whole, b);
}

// grid: (rows, 1, 1), threads: heads * ceil(head_dim / 16) rounded up to a multiple of 32 if that is at most 256, else
// a multiple of 32 that leaves the fewest of them idle in the last round
KERNEL(rope, 256, OUT(0, Element, x), IN(1, float, cos), IN(2, float, sin), IN(3, uint, positions),
       PARAMETERS(4, RopeParameters, p)) {
    const uint half_dim = p.head_dim / 2, chunks = (half_dim + 7) / 8;
    const index_t angles = index_t(positions[BLOCK_X]) * half_dim;
    const Turn turn = {x + index_t(BLOCK_X) * p.width, cos + angles, sin + angles, p.sign};
    for (uint chunk = THREAD; chunk < p.heads * chunks; chunk += THREADS) {
        const uint at = chunk % chunks * 8, low = chunk / chunks * p.head_dim + at;
        if (p.aligned) turn8<true>(turn, low, at, half_dim);
        else turn8<false>(turn, low, at, half_dim);
    }
}

// Rows of queries, keys and values, of `heads` and twice `kv_heads` heads.
struct RopeCacheParameters {
    uint heads, kv_heads, head_dim;
    uint rotates; // else queries and keys stay as they are, and no table is read
    uint aligned; // of head_dim / 2
};

// One head of a row: its addresses for reading and writing, and its position's row of the tables.
struct Head {
    GLOBAL(const Element) from;
    GLOBAL(Element) to;
    GLOBAL(const float) cos;
    GLOBAL(const float) sin;
    bool rotates;
};

// The pairs at [at, at + left) of the head. With `whole` 8 are left and on 16-byte boundaries.
template <bool whole>
INLINE void head8(Head h, uint at, uint half_dim) {
    const uint left = whole ? 8 : half_dim - at;
    float a[8], b[8];
    load8(h.from, at, left, whole, a);
    load8(h.from, at + half_dim, left, whole, b);
    if (h.rotates) {
        float c[8], s[8];
        load8(h.cos, at, left, whole, c);
        load8(h.sin, at, left, whole, s);
        turn_pairs(a, b, c, s, 1.0f);
    }
    store8(h.to, at, left, whole, a);
    store8(h.to, at + half_dim, left, whole, b);
}

// Queries go to a matrix of their own, keys and values to row rows[t] of the cache. The host holds these rows under the
// cache's, and gives no row twice.
// grid: (rows, 1, 1), threads: (heads + 2 kv_heads) * ceil(head_dim / 16) rounded up to a multiple of 32, at most 256
KERNEL(rope_cache, 256, IN(0, Element, qkv), IN(1, float, cos), IN(2, float, sin), IN(3, uint, positions),
       IN(4, uint, rows), OUT(5, Element, queries), OUT(6, Element, cache), PARAMETERS(7, RopeCacheParameters, p)) {
    const uint half_dim = p.head_dim / 2, chunks = (half_dim + 7) / 8, all = p.heads + 2 * p.kv_heads;
    const index_t angles = p.rotates ? index_t(positions[BLOCK_X]) * half_dim : 0;
    const index_t row = index_t(BLOCK_X) * all, query = index_t(BLOCK_X) * p.heads;
    const index_t cached = index_t(rows[BLOCK_X]) * (2 * p.kv_heads);
    for (uint chunk = THREAD; chunk < all * chunks; chunk += THREADS) {
        const uint head = chunk / chunks, at = chunk % chunks * 8;
        GLOBAL(Element) to = head < p.heads ? queries + (query + head) * p.head_dim
                                            : cache + (cached + (head - p.heads)) * p.head_dim;
        const bool rotates = p.rotates && head < p.heads + p.kv_heads;
        const Head h = {qkv + (row + head) * p.head_dim, to, cos + angles, sin + angles, rotates};
        if (p.aligned) head8<true>(h, at, half_dim);
        else head8<false>(h, at, half_dim);
    }
}
