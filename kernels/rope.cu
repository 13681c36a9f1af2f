// Rotary position embedding on the leading heads of each row, in place (src/ops/rope.rs):
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

// The row, and its position's row of the tables.
struct Turn {
    GLOBAL(Element) row;
    GLOBAL(const float) cos;
    GLOBAL(const float) sin;
    float sign;
};

// Turns the pairs at [low, low + left) of the row. With `whole` 8 are left and on 16-byte boundaries.
template <bool whole>
INLINE void turn8(Turn t, uint low, uint at, uint half_dim) {
    const uint left = whole ? 8 : half_dim - at;
    float a[8], b[8], c[8], s[8];
    load8(t.row, low, left, whole, a);
    load8(t.row, low + half_dim, left, whole, b);
    load8(t.cos, at, left, whole, c);
    load8(t.sin, at, left, whole, s);
    UNROLL for (uint i = 0; i < 8; ++i) {
        const float turned = t.sign * s[i], first = a[i], second = b[i];
        a[i] = first * c[i] - second * turned;
        b[i] = second * c[i] + first * turned;
    }
    store8(t.row, low, left, whole, a);
    store8(t.row, low + half_dim, left, whole, b);
}

// grid: (rows, 1, 1), threads: heads * ceil(head_dim / 16) rounded up to a multiple of 32 where that is at most 256, else
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
