// Rows of a matrix by number (src/ops/rows/mod.rs):
//
//   y[i]            = x[rows[i]]                                         rows_forward
//   dx[t]           = dy[i] if rows[i] == t, else 0                      rows_backward
//   x[rows[i]]     += dy[i]                                              rows_add
//   x[t, column..] += leading[t]            for the first rows t         rows_add_leading
//
// The host holds the row numbers under the rows of x, and ascending: no two blocks write the same row.
//
// grid: one block a row that is written, threads: columns / 8 rounded up to a multiple of 32, at most 256

struct RowsParameters {
    uint width;   // columns of x
    uint count;   // row numbers
    uint column;  // first column that rows_add_leading changes
    uint columns; // columns that it changes
    uint aligned;
};

INLINE void copy8(GLOBAL(const Element) from, GLOBAL(Element) to, uint left, bool aligned) {
    float values[8];
    load8(from, 0, left, aligned, values);
    store8(to, 0, left, aligned, values);
}

template <typename T>
INLINE void add8(GLOBAL(Element) to, GLOBAL(const T) from, uint left, bool aligned) {
    float sum[8], more[8];
    load8(to, 0, left, aligned, sum);
    load8(from, 0, left, aligned, more);
    UNROLL for (uint i = 0; i < 8; ++i) sum[i] += more[i];
    store8(to, 0, left, aligned, sum);
}

KERNEL(rows_forward, 256, IN(0, Element, x), IN(1, uint, rows), OUT(2, Element, y), PARAMETERS(3, RowsParameters, p)) {
    const index_t from = index_t(rows[BLOCK_X]) * p.width, to = index_t(BLOCK_X) * p.width;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8)
        copy8(x + (from + at), y + (to + at), p.width - at, p.aligned != 0);
}

// Each block looks for its row among the ascending numbers.
KERNEL(rows_backward, 256, IN(0, Element, dy), IN(1, uint, rows), OUT(2, Element, dx),
       PARAMETERS(3, RowsParameters, p)) {
    uint low = 0, high = p.count;
    while (low < high) {
        const uint middle = (low + high) / 2;
        if (rows[middle] < BLOCK_X) low = middle + 1;
        else high = middle;
    }
    const bool found = low < p.count && rows[low < p.count ? low : 0] == BLOCK_X;
    const index_t from = index_t(low) * p.width, to = index_t(BLOCK_X) * p.width;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8) {
        float values[8];
        UNROLL for (uint i = 0; i < 8; ++i) values[i] = 0.0f;
        if (found) load8(dy, from + at, p.width - at, p.aligned != 0, values);
        store8(dx, to + at, p.width - at, p.aligned != 0, values);
    }
}

KERNEL(rows_add, 256, OUT(0, Element, x), IN(1, Element, dy), IN(2, uint, rows), PARAMETERS(3, RowsParameters, p)) {
    const index_t to = index_t(rows[BLOCK_X]) * p.width, from = index_t(BLOCK_X) * p.width;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8)
        add8<Element>(x + (to + at), dy + (from + at), p.width - at, p.aligned != 0);
}

KERNEL(rows_add_leading, 256, OUT(0, Element, x), IN(1, float, leading), PARAMETERS(2, RowsParameters, p)) {
    const index_t to = index_t(BLOCK_X) * p.width + p.column, from = index_t(BLOCK_X) * p.columns;
    for (uint at = THREAD * 8; at < p.columns; at += THREADS * 8)
        add8<float>(x + (to + at), leading + (from + at), p.columns - at, p.aligned != 0);
}
