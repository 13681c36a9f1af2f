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

// grid: (rows, 1, 1), threads: heads * ceil(head_dim / 16) rounded up to a multiple of 32, at most 256
KERNEL(rope, 256, OUT(0, Element, x), IN(1, float, cos), IN(2, float, sin), IN(3, uint, positions),
       PARAMETERS(4, RopeParameters, p)) {
    const bool aligned = p.aligned != 0;
    const uint half_dim = p.head_dim / 2, chunks = (half_dim + 7) / 8;
    const index_t row = index_t(BLOCK_X) * p.width, angles = index_t(positions[BLOCK_X]) * half_dim;
    for (uint chunk = THREAD; chunk < p.heads * chunks; chunk += THREADS) {
        const uint head = chunk / chunks, at = chunk % chunks * 8, left = half_dim - at;
        const index_t low = row + head * p.head_dim + at, high = low + half_dim;
        float a[8], b[8], c[8], s[8];
        load8(x, low, left, aligned, a);
        load8(x, high, left, aligned, b);
        load8(cos, angles + at, left, aligned, c);
        load8(sin, angles + at, left, aligned, s);
        UNROLL for (uint i = 0; i < 8; ++i) {
            const float turn = p.sign * s[i], first = a[i], second = b[i];
            a[i] = first * c[i] - second * turn;
            b[i] = second * c[i] + first * turn;
        }
        store8(x, low, left, aligned, a);
        store8(x, high, left, aligned, b);
    }
}
