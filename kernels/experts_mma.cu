// The products of experts.cu on CUDA's tensor cores, for elements of 16 bits in rows of a multiple of 8: the same buffers
// and parameters, and tiles of the same rows.
//
// A block has 4 warps. Of a tile of 64 rows each owns 32 rows and 64 columns, so that three operands that it reads from
// shared memory feed eight products; of one of 16 rows, which is bound by reading the weights, all rows and 32 columns.
// Tiles are copied asynchronously, two steps ahead; their 16-byte chunks are swizzled so that 8 rows' same chunk is in 8
// different banks.

#if defined(ELEMENT_BF16) || defined(ELEMENT_F16)

struct ExpertProductParameters {
    uint experts, depth, columns; // a product sums over `depth` values
    float scale;
    uint aligned;
};

#define BLOCK 128
#define COLUMNS 128
// Values of a sum in a stage.
#define DEPTH 64
// Stages in shared memory: one is multiplied while the others are on their way.
#define STAGES 3

struct Product {
    GLOBAL(const Element) x;       // [pairs, depth]
    GLOBAL(const Element) weights; // per expert [columns, depth], or [depth, columns] if not transposed
    GLOBAL(const uint) offsets;
    GLOBAL(const uint) tiles;
    GLOBAL(Element) y; // [pairs, columns]
    GROUP(Element) stages;
    GROUP(uint) expert;
};

// How the warps share a tile of ROWS rows.
template <uint ROWS>
struct Share {
    enum : uint {
        rows = ROWS == 64 ? 32 : 16,
        columns = ROWS == 64 ? 64 : 32,
        down = ROWS / rows,
        // Elements of a stage: rows of x, then of the weights.
        left = ROWS * DEPTH,
        stage = left + COLUMNS * DEPTH
    };
};

INLINE uint smaller(uint a, uint b) { return a < b ? a : b; }

// Where 8 elements of a row lie in a tile of rows of D elements.
template <uint D>
INLINE uint swizzled(uint row, uint chunk) {
    return row * D + (chunk ^ (row % 8)) * 8;
}

// Starts copying COUNT rows of D elements, of which `rows` and `columns` exist; the others are zeros and are not read.
template <uint D, uint COUNT>
INLINE void copy_rows(GROUP(Element) to, GLOBAL(const Element) from, uint width, uint rows, uint columns, uint thread) {
    const uint chunk = thread % (D / 8), row = thread / (D / 8), step = BLOCK / (D / 8);
    if (8 * chunk >= columns) rows = 0;
    GLOBAL(const Element) next = from + ((index_t)row * width + chunk * 8);
    UNROLL for (uint i = 0; i < COUNT / step; ++i) {
        cp_async16(to + (swizzled<D>(row, chunk) + step * i * D), next, row + step * i < rows);
        next = next + (index_t)step * width;
    }
}

// Operands of mma_16x8x16 from 16 rows of a tile and 16 columns, `step` times 16 on: `left` the rows as they lie; `right`
// their transpose, two operands for 8 rows each; `right_columns` as they lie, two operands for 8 columns each. A step
// changes bits of the swizzled place that nothing is carried into.
template <uint D>
INLINE void left(LOCAL(uint) r, GROUP(const Element) tile, uint row, uint step, uint lane) {
    ldmatrix4(r, tile + row * D + (swizzled<D>(lane % 16, lane / 16) ^ 16 * step));
}
template <uint D>
INLINE void right(LOCAL(uint) r, GROUP(const Element) tile, uint row, uint step, uint lane) {
    ldmatrix4(r, tile + row * D + (swizzled<D>(lane / 16 * 8 + lane % 8, lane / 8 % 2) ^ 16 * step));
}
template <uint D>
INLINE void right_columns(LOCAL(uint) r, GROUP(const Element) tile, uint row, uint step, uint lane) {
    ldmatrix4_transposed(r, tile + row * D + (swizzled<D>(lane % 16, lane / 16) ^ 16 * step));
}

// Of 4 neighbouring lanes each has 2 columns of 4 times 8; lane i gets the i-th 8.
INLINE void gather_columns(LOCAL(const float) pairs, uint lane, LOCAL(float) out) {
    const bool odd = lane % 2 != 0, high = lane / 2 % 2 != 0;
    float four[2][4];
    UNROLL for (uint t = 0; t < 2; ++t)
        UNROLL for (uint i = 0; i < 2; ++i) {
            const float keep = odd ? pairs[4 * t + 2 + i] : pairs[4 * t + i];
            const float got = shuffle_xor(odd ? pairs[4 * t + i] : pairs[4 * t + 2 + i], 1);
            four[t][i] = odd ? got : keep;
            four[t][2 + i] = odd ? keep : got;
        }
    UNROLL for (uint i = 0; i < 4; ++i) {
        const float keep = high ? four[1][i] : four[0][i];
        const float got = shuffle_xor(high ? four[0][i] : four[1][i], 2);
        out[i] = high ? got : keep;
        out[4 + i] = high ? keep : got;
    }
}

// The rows of an expert and the columns that a block makes.
struct Tile {
    GLOBAL(const Element) weights; // the expert's
    uint first, count, column;
};

template <uint ROWS, bool TRANSPOSED>
INLINE void copy_stage(GROUP(Element) to, Product m, Tile tile, GIVEN(ExpertProductParameters) p, uint depth, uint id) {
    const uint left = p.depth - depth, columns = p.columns - tile.column;
    copy_rows<DEPTH, ROWS>(to, m.x + (index_t(tile.first) * p.depth + depth), p.depth, tile.count, left, id);
    GROUP(Element) weights = to + Share<ROWS>::left;
    if (TRANSPOSED)
        copy_rows<DEPTH, COLUMNS>(weights, tile.weights + (index_t(tile.column) * p.depth + depth), p.depth, columns,
                                  left, id);
    else
        copy_rows<COLUMNS, DEPTH>(weights, tile.weights + (index_t(depth) * p.columns + tile.column), p.columns, left,
                                  columns, id);
}

// Adds a stage's products to a warp's sums; `row` and `column` are the warp's first.
template <uint ROWS, bool TRANSPOSED>
INLINE void add_stage(GROUP(const Element) stage, uint row, uint column, uint lane,
                      float (&sums)[Share<ROWS>::rows / 16][Share<ROWS>::columns / 2]) {
    typedef Share<ROWS> S;
    GROUP(const Element) weights = stage + S::left;
    UNROLL for (uint step = 0; step < DEPTH / 16; ++step) {
        uint a[S::rows / 16][4];
        UNROLL for (uint i = 0; i < S::rows / 16; ++i) left<DEPTH>(a[i], stage, row + 16 * i, step, lane);
        UNROLL for (uint g = 0; g < S::columns / 16; ++g) {
            uint b[4];
            if (TRANSPOSED) right<DEPTH>(b, weights, column + 16 * g, step, lane);
            else right_columns<COLUMNS>(b, weights, 16 * step, column / 16 + g, lane);
            UNROLL for (uint i = 0; i < S::rows / 16; ++i) {
                mma_16x8x16(sums[i] + 8 * g, a[i], b);
                mma_16x8x16(sums[i] + 8 * g + 4, a[i], b + 2);
            }
        }
    }
}

template <uint ROWS, bool TRANSPOSED>
INLINE void multiply(Product m, GIVEN(ExpertProductParameters) p, uint column, uint tile, uint id) {
    typedef Share<ROWS> S;
    if (tile >= m.tiles[p.experts]) return;
    // The one expert with rows in this tile.
    if (id < p.experts && m.tiles[id] <= tile && tile < m.tiles[id + 1]) m.expert[0] = id;
    BARRIER();
    const uint expert = m.expert[0], first = m.offsets[expert] + (tile - m.tiles[expert]) * ROWS;
    Tile t;
    t.weights = m.weights + index_t(expert) * p.depth * p.columns;
    t.first = first;
    t.count = smaller(ROWS, m.offsets[expert + 1] - first);
    t.column = column;
    const uint lane = id % 32, warp = id / 32, warp_row = warp % S::down * S::rows;
    const uint warp_column = warp / S::down * S::columns;
    float sums[S::rows / 16][S::columns / 2];
    UNROLL for (uint i = 0; i < S::rows / 16; ++i)
        UNROLL for (uint j = 0; j < S::columns / 2; ++j) sums[i][j] = 0.0f;
    for (uint stage = 0; stage + 1 < STAGES; ++stage) {
        if (stage * DEPTH < p.depth)
            copy_stage<ROWS, TRANSPOSED>(m.stages + stage * S::stage, m, t, p, stage * DEPTH, id);
        cp_async_commit();
    }
    uint stage = 0;
    for (uint depth = 0; depth < p.depth; depth += DEPTH) {
        cp_async_wait(STAGES - 2);
        // All copies of the stage have landed, and the one before it is no longer read: it is filled again.
        BARRIER();
        const uint ahead = depth + (STAGES - 1) * DEPTH, filled = stage == 0 ? STAGES - 1 : stage - 1;
        if (ahead < p.depth) copy_stage<ROWS, TRANSPOSED>(m.stages + filled * S::stage, m, t, p, ahead, id);
        cp_async_commit();
        add_stage<ROWS, TRANSPOSED>(m.stages + stage * S::stage, warp_row, warp_column, lane, sums);
        stage = stage + 1 == STAGES ? 0 : stage + 1;
    }
    UNROLL for (uint i = 0; i < S::rows / 16; ++i) {
        UNROLL for (uint half = 0; half < 2; ++half) {
            const uint row = warp_row + 16 * i + lane / 4 + 8 * half;
            UNROLL for (uint block = 0; block < S::columns / 32; ++block) {
                float pairs[8], values[8];
                UNROLL for (uint c = 0; c < 8; ++c)
                    pairs[c] = p.scale * sums[i][16 * block + 4 * (c / 2) + 2 * half + c % 2];
                gather_columns(pairs, lane, values);
                const uint to = column + warp_column + 32 * block + lane % 4 * 8;
                if (row < t.count && to < p.columns)
                    store8(m.y, index_t(first + row) * p.columns + to, 8, true, values);
            }
        }
    }
}

// grid: (ceil(columns / 128), tiles that there may be, 1), threads: 128; `rows` is the rows of a tile
// dynamic shared memory: 3 stages of (rows + 128) * 64 elements
#define EXPERT_PRODUCT(name, rows, transposed) \
    KERNEL(name, BLOCK, IN(0, Element, x), IN(1, Element, weights), IN(2, uint, offsets), IN(3, uint, tiles), \
           OUT(4, Element, y), PARAMETERS(5, ExpertProductParameters, p)) { \
        DYNAMIC_SHARED(Element, stages); \
        SHARED(uint, expert, 1); \
        Product m; \
        m.x = x, m.weights = weights, m.offsets = offsets, m.tiles = tiles, m.y = y; \
        m.stages = stages, m.expert = expert; \
        multiply<rows, transposed>(m, p, BLOCK_X *COLUMNS, BLOCK_Y, THREAD); \
    }

// y = x Wᵀ
EXPERT_PRODUCT(experts_mma_forward_16, 16, true)
EXPERT_PRODUCT(experts_mma_forward_64, 64, true)
// y = scale * x W
EXPERT_PRODUCT(experts_mma_backward_16, 16, false)
EXPERT_PRODUCT(experts_mma_backward_64, 64, false)

#endif
