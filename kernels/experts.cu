// Experts (src/ops/experts/mod.rs): the choice of each row, the pairs of rows and experts sorted by expert, the products
// of each expert for its rows, and the rows' sums.
//
//   chosen[t], p[t] = the k largest logits of row t, and their softmax     experts_route
//   order, place    = counting sort of the pairs by expert                 experts_count, experts_place
//   x[s]            = u[order[s] / k]                                      experts_gather
//   h[s]            = x[s] W[e]ᵀ      offsets[e] <= s < offsets[e + 1]      experts_forward
//   a[s]            = p[order[s]] * silu(gate) * up                        experts_activation_forward
//   out[t]          = sum over j of y[place[t, j]]                         experts_combine
//
// Nothing waits for the host: the number of an expert's rows is known on the device alone. The products are launched with
// a block for each tile that there may be, and each block looks for its expert.

// The host holds the number of experts under this.
#define MOST_EXPERTS 128
// Lanes of a warp that share a row's experts have this many each.
#define LANE_EXPERTS (MOST_EXPERTS / 32)

INLINE uint smaller(uint a, uint b) { return a < b ? a : b; }

// ---- The choice.

struct ExpertRouteParameters {
    uint rows, experts, per_token;
};

// A logit as logits are compared: NaN is the largest, as in torch.topk, and no value is infinite.
INLINE float comparable(float x) { return x <= 3e38f ? max_(x, -3e38f) : 3e38f; }
// Less than every comparable logit: that of an expert that is chosen already.
#define TAKEN (-3.4e38f)

// Of equal logits the lowest expert comes first. With a NaN or an infinity among them all of a row's weights are NaN.
//
// grid: (ceil(rows / 4), 1, 1), threads: 128; a warp does a row
KERNEL(experts_route, 128, IN(0, Element, logits), OUT(1, float, weights), OUT(2, uint, chosen),
       PARAMETERS(3, ExpertRouteParameters, p)) {
    const uint row = BLOCK_X * (THREADS / 32) + WARP;
    if (row >= p.rows) return;
    const index_t first = index_t(row) * p.experts, to = index_t(row) * p.per_token;
    float left[LANE_EXPERTS], values[LANE_EXPERTS], top = 0.0f;
    UNROLL for (uint i = 0; i < LANE_EXPERTS; ++i) {
        const uint expert = LANE + 32 * i;
        left[i] = expert < p.experts ? comparable(wide(logits[first + expert])) : TAKEN;
    }
    // Choice j is kept by lane j % 32.
    UNROLL for (uint i = 0; i < LANE_EXPERTS; ++i) {
        values[i] = 0.0f;
        for (uint j = 32 * i; j < smaller(32 * i + 32, p.per_token); ++j) {
            float best = left[0];
            uint expert = LANE;
            UNROLL for (uint n = 1; n < LANE_EXPERTS; ++n) {
                expert = left[n] > best ? LANE + 32 * n : expert;
                best = max_(best, left[n]);
            }
            const float largest = warp_max(best);
            // The lowest expert of those with the largest logit.
            const uint winner = uint(-warp_max(best == largest ? -float(expert) : -1e6f));
            UNROLL for (uint n = 0; n < LANE_EXPERTS; ++n) left[n] = winner == LANE + 32 * n ? TAKEN : left[n];
            const float logit = wide(logits[first + winner]);
            top = j == 0 ? logit : top;
            if (j % 32 == LANE) {
                values[i] = logit;
                chosen[to + j] = winner;
            }
        }
    }
    float sum = 0.0f;
    UNROLL for (uint i = 0; i < LANE_EXPERTS; ++i) {
        values[i] = LANE + 32 * i < p.per_token ? exp_(values[i] - top) : 0.0f;
        sum += values[i];
    }
    sum = warp_sum(sum);
    UNROLL for (uint i = 0; i < LANE_EXPERTS; ++i)
        if (LANE + 32 * i < p.per_token) weights[to + LANE + 32 * i] = values[i] / sum;
}

// Gradient of the logits: p (dp - sum over the chosen of p dp) for the chosen, 0 for the others.
//
// grid: (ceil(rows / 4), 1, 1), threads: 128; a warp does a row
KERNEL(experts_route_backward, 128, IN(0, float, weights), IN(1, uint, chosen), IN(2, uint, place),
       IN(3, float, dweights), OUT(4, Element, dlogits), PARAMETERS(5, ExpertRouteParameters, p)) {
    const uint row = BLOCK_X * (THREADS / 32) + WARP;
    if (row >= p.rows) return;
    const index_t from = index_t(row) * p.per_token;
    float mean = 0.0f;
    for (uint j = 0; j < p.per_token; ++j) mean += weights[from + j] * dweights[place[from + j]];
    for (uint expert = LANE; expert < p.experts; expert += 32) {
        float gradient = 0.0f;
        for (uint j = 0; j < p.per_token; ++j)
            if (chosen[from + j] == expert) gradient = weights[from + j] * (dweights[place[from + j]] - mean);
        dlogits[index_t(row) * p.experts + expert] = narrow(gradient);
    }
}

// ---- The sort. Pair t k + j is choice j of row t. Pairs are counted and placed part by part, each by a block with a
// thread for each expert: pairs stay in order, and no result depends on which block is first.

struct ExpertSortParameters {
    uint pairs, experts, parts;
    uint tile_rows; // rows of a product's tile
};

// Pairs of a part.
#define PART_PAIRS 512

INLINE void load_part(GROUP(uint) to, GLOBAL(const uint) chosen, uint first, uint count, uint id) {
    for (uint i = id; i < count; i += MOST_EXPERTS) to[i] = chosen[first + i];
}

// counts[part, e] = the part's pairs of expert e
//
// grid: (parts, 1, 1), threads: 128
KERNEL(experts_count, 128, IN(0, uint, chosen), OUT(1, uint, counts), PARAMETERS(2, ExpertSortParameters, p)) {
    SHARED(uint, part, PART_PAIRS);
    const uint first = BLOCK_X * PART_PAIRS, count = smaller(PART_PAIRS, p.pairs - first);
    load_part(part, chosen, first, count, THREAD);
    BARRIER();
    uint found = 0;
    for (uint i = 0; i < count; ++i) found += part[i] == THREAD ? 1 : 0;
    if (THREAD < p.experts) counts[index_t(BLOCK_X) * p.experts + THREAD] = found;
}

// The sum of `x` of this thread and those before it; all threads of the block must come to it.
INLINE uint sum_up_to(uint x, GROUP(uint) sums, uint id) {
    sums[id] = x;
    BARRIER();
    for (uint distance = 1; distance < MOST_EXPERTS; distance *= 2) {
        const uint before = id >= distance ? sums[id - distance] : 0;
        BARRIER();
        sums[id] += before;
        BARRIER();
    }
    const uint sum = sums[id];
    BARRIER();
    return sum;
}

// order[s]   = the pair at place s          place[pair] = its place
// offsets[e] = the first place of expert e  tiles[e]    = the first tile of its rows; the last of both: how many there are
//
// grid: (parts, 1, 1), threads: 128
KERNEL(experts_place, 128, IN(0, uint, chosen), IN(1, uint, counts), OUT(2, uint, order), OUT(3, uint, place),
       OUT(4, uint, offsets), OUT(5, uint, tiles), PARAMETERS(6, ExpertSortParameters, p)) {
    SHARED(uint, part, PART_PAIRS);
    SHARED(uint, sums, MOST_EXPERTS);
    const uint first = BLOCK_X * PART_PAIRS, count = smaller(PART_PAIRS, p.pairs - first);
    load_part(part, chosen, first, count, THREAD);
    uint all = 0, before = 0;
    if (THREAD < p.experts) {
        for (uint i = 0; i < p.parts; ++i) {
            const uint found = counts[index_t(i) * p.experts + THREAD];
            all += found;
            before += i < BLOCK_X ? found : 0;
        }
    }
    const uint end = sum_up_to(all, sums, THREAD);
    if (BLOCK_X == 0) {
        const uint own_tiles = (all + p.tile_rows - 1) / p.tile_rows, tiles_end = sum_up_to(own_tiles, sums, THREAD);
        if (THREAD < p.experts) {
            offsets[THREAD] = end - all;
            tiles[THREAD] = tiles_end - own_tiles;
        }
        if (THREAD + 1 == p.experts) {
            offsets[p.experts] = end;
            tiles[p.experts] = tiles_end;
        }
    }
    uint next = end - all + before;
    for (uint i = 0; i < count; ++i) {
        if (part[i] != THREAD) continue;
        order[next] = first + i;
        place[first + i] = next;
        next += 1;
    }
}

// ---- Rows of pairs.

struct ExpertRowsParameters {
    uint width; // columns
    uint per_token;
    uint aligned;
};

// grid: (pairs, 1, 1), threads: width / 8 rounded up to a multiple of 32, at most 256
KERNEL(experts_gather, 256, IN(0, Element, x), IN(1, uint, order), OUT(2, Element, y),
       PARAMETERS(3, ExpertRowsParameters, p)) {
    const index_t from = index_t(order[BLOCK_X] / p.per_token) * p.width, to = index_t(BLOCK_X) * p.width;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8) {
        float values[8];
        load8(x, from + at, p.width - at, p.aligned != 0, values);
        store8(y, to + at, p.width - at, p.aligned != 0, values);
    }
}

// grid: (rows, ceil(width / (8 * threads)), 1), threads: a multiple of 32, at most 256
KERNEL(experts_combine, 256, IN(0, Element, y), IN(1, uint, place), OUT(2, Element, x),
       PARAMETERS(3, ExpertRowsParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.width) return;
    const index_t first = index_t(BLOCK_X) * p.per_token;
    float sum[8];
    UNROLL for (uint i = 0; i < 8; ++i) sum[i] = 0.0f;
    for (uint j = 0; j < p.per_token; ++j) {
        float values[8];
        load8(y, index_t(place[first + j]) * p.width + at, p.width - at, p.aligned != 0, values);
        UNROLL for (uint i = 0; i < 8; ++i) sum[i] += values[i];
    }
    store8(x, index_t(BLOCK_X) * p.width + at, p.width - at, p.aligned != 0, sum);
}

// ---- The activation, as in swiglu.cu, times the pair's weight; h [pairs, 2 width].

INLINE float sigmoid(float x) { return reciprocal_(1.0f + exp_(-x)); }

// grid: (pairs, ceil(width / (8 * threads)), 1), threads: a multiple of 32, at most 256
KERNEL(experts_activation_forward, 256, IN(0, Element, h), IN(1, float, weights), IN(2, uint, order),
       OUT(3, Element, a), PARAMETERS(4, ExpertRowsParameters, p)) {
    const uint at = (BLOCK_Y * THREADS + THREAD) * 8;
    if (at >= p.width) return;
    const uint left = p.width - at;
    const index_t row = index_t(BLOCK_X) * p.width;
    const float weight = weights[order[BLOCK_X]];
    float g[8], up[8];
    load8(h, 2 * row + at, left, p.aligned != 0, g);
    load8(h, 2 * row + p.width + at, left, p.aligned != 0, up);
    UNROLL for (uint i = 0; i < 8; ++i) g[i] *= weight * sigmoid(g[i]) * up[i];
    store8(a, row + at, left, p.aligned != 0, g);
}

// Also the gradient of the weight: the sum of da * silu(gate) * up over the row, which one block does.
//
// grid: (pairs, 1, 1), threads: a multiple of 32, at most 256
KERNEL(experts_activation_backward, 256, IN(0, Element, da), IN(1, Element, h), IN(2, float, weights),
       IN(3, uint, order), OUT(4, Element, dh), OUT(5, float, dweights), PARAMETERS(6, ExpertRowsParameters, p)) {
    SHARED(float, scratch, 32);
    const index_t row = index_t(BLOCK_X) * p.width;
    const float weight = weights[order[BLOCK_X]];
    float dweight = 0.0f;
    for (uint at = THREAD * 8; at < p.width; at += THREADS * 8) {
        const uint left = p.width - at;
        float d[8], g[8], up[8];
        load8(da, row + at, left, p.aligned != 0, d);
        load8(h, 2 * row + at, left, p.aligned != 0, g);
        load8(h, 2 * row + p.width + at, left, p.aligned != 0, up);
        UNROLL for (uint i = 0; i < 8; ++i) {
            const float s = sigmoid(g[i]), silu = g[i] * s;
            dweight += d[i] * silu * up[i];
            g[i] = weight * d[i] * up[i] * s * (1.0f + g[i] * (1.0f - s));
            up[i] = weight * d[i] * silu;
        }
        store8(dh, 2 * row + at, left, p.aligned != 0, g);
        store8(dh, 2 * row + p.width + at, left, p.aligned != 0, up);
    }
    dweight = block_sum(dweight, scratch, THREAD, THREADS);
    if (THREAD == 0) dweights[BLOCK_X] = dweight;
}

// ---- The products: a block makes a tile of one expert's rows, 64 columns of them.

struct ExpertProductParameters {
    uint experts, depth, columns; // a product sums over `depth` values
    float scale;
    uint aligned;
};

#define BLOCK 256
#define COLUMNS 64
// Values of a sum that are in shared memory at a time.
#define DEPTH 32
// Floats from row to row of a tile of sums' values: 16-byte accesses to neighbouring rows go to different banks.
#define STRIDE (DEPTH + 4)
// The same of a tile of columns.
#define ACROSS (COLUMNS + 4)

struct Product {
    GLOBAL(const Element) x;       // [pairs, depth]
    GLOBAL(const Element) weights; // per expert [columns, depth], or [depth, columns] if not transposed
    GLOBAL(const uint) offsets;
    GLOBAL(const uint) tiles;
    GLOBAL(Element) y; // [pairs, columns]
    GROUP(float) left;
    GROUP(float) right;
    GROUP(uint) expert;
};

// `count` rows of a matrix from `from` on, DEPTH values each from column `depth` on; zeros for others.
template <uint ROWS>
INLINE void load_rows(GROUP(float) to, GLOBAL(const Element) matrix, index_t from, uint count, uint depth,
                      GIVEN(ExpertProductParameters) p, uint id) {
    const uint row = id / (DEPTH / 8), column = depth + id % (DEPTH / 8) * 8;
    if (row >= ROWS) return;
    float values[8];
    const uint left = row < count && column < p.depth ? p.depth - column : 0;
    load8(matrix, (from + row) * p.depth + column, left, p.aligned != 0, values);
    UNROLL for (uint i = 0; i < 8; ++i) to[row * STRIDE + column - depth + i] = values[i];
}

// DEPTH rows of an expert's [depth, columns] matrix, COLUMNS values each from `column` on.
INLINE void load_columns(GROUP(float) to, GLOBAL(const Element) matrix, uint column, uint depth,
                         GIVEN(ExpertProductParameters) p, uint id) {
    const uint row = id / (COLUMNS / 8), at = id % (COLUMNS / 8) * 8;
    float values[8];
    const uint left = depth + row < p.depth && column + at < p.columns ? p.columns - column - at : 0;
    load8(matrix, index_t(depth + row) * p.columns + column + at, left, p.aligned != 0, values);
    UNROLL for (uint i = 0; i < 8; ++i) to[row * ACROSS + at + i] = values[i];
}

// Adds what the tiles in shared memory give to a thread's sums: of rows id / 16 + 16 i; of columns id % 16 + 16 j if
// transposed, else id % 16 * 4 + j, so that a thread's values follow one another in a row of the tile.
template <uint ROWS, bool TRANSPOSED>
INLINE void add_tile(Product m, uint id, LOCAL(float) sums) {
    const uint row = id / 16, column = id % 16;
    for (uint d = 0; d < DEPTH; d += 4) {
        float x[ROWS / 16][4], w[4][4];
        UNROLL for (uint i = 0; i < ROWS / 16; ++i)
            UNROLL for (uint e = 0; e < 4; ++e) x[i][e] = m.left[(row + 16 * i) * STRIDE + d + e];
        if (TRANSPOSED) {
            UNROLL for (uint j = 0; j < 4; ++j)
                UNROLL for (uint e = 0; e < 4; ++e) w[e][j] = m.right[(column + 16 * j) * STRIDE + d + e];
        } else {
            UNROLL for (uint e = 0; e < 4; ++e)
                UNROLL for (uint j = 0; j < 4; ++j) w[e][j] = m.right[(d + e) * ACROSS + 4 * column + j];
        }
        UNROLL for (uint i = 0; i < ROWS / 16; ++i)
            UNROLL for (uint j = 0; j < 4; ++j)
                UNROLL for (uint e = 0; e < 4; ++e) sums[4 * i + j] += x[i][e] * w[e][j];
    }
}

template <uint ROWS, bool TRANSPOSED>
INLINE void multiply(Product m, GIVEN(ExpertProductParameters) p, uint column, uint tile, uint id) {
    if (tile >= m.tiles[p.experts]) return;
    // The one expert with rows in this tile.
    if (id < p.experts && m.tiles[id] <= tile && tile < m.tiles[id + 1]) m.expert[0] = id;
    BARRIER();
    const uint expert = m.expert[0], first = m.offsets[expert] + (tile - m.tiles[expert]) * ROWS;
    const uint count = smaller(ROWS, m.offsets[expert + 1] - first);
    GLOBAL(const Element) weights = m.weights + index_t(expert) * p.depth * p.columns;
    float sums[ROWS / 16 * 4];
    UNROLL for (uint i = 0; i < ROWS / 16 * 4; ++i) sums[i] = 0.0f;
    for (uint depth = 0; depth < p.depth; depth += DEPTH) {
        load_rows<ROWS>(m.left, m.x, first, count, depth, p, id);
        if (TRANSPOSED) load_rows<COLUMNS>(m.right, weights, column, smaller(COLUMNS, p.columns - column), depth, p, id);
        else load_columns(m.right, weights, column, depth, p, id);
        BARRIER();
        add_tile<ROWS, TRANSPOSED>(m, id, sums);
        BARRIER();
    }
    UNROLL for (uint i = 0; i < ROWS / 16; ++i) {
        UNROLL for (uint j = 0; j < 4; ++j) {
            const uint row = id / 16 + 16 * i, at = column + (TRANSPOSED ? id % 16 + 16 * j : id % 16 * 4 + j);
            if (row < count && at < p.columns)
                m.y[index_t(first + row) * p.columns + at] = narrow(p.scale * sums[4 * i + j]);
        }
    }
}

// grid: (ceil(columns / 64), tiles that there may be, 1), threads: 256; `rows` is the rows of a tile
#define EXPERT_PRODUCT(name, rows, transposed) \
    KERNEL(name, BLOCK, IN(0, Element, x), IN(1, Element, weights), IN(2, uint, offsets), IN(3, uint, tiles), \
           OUT(4, Element, y), PARAMETERS(5, ExpertProductParameters, p)) { \
        SHARED(float, left, rows *STRIDE); \
        SHARED(float, right, transposed ? COLUMNS * STRIDE : DEPTH * ACROSS); \
        SHARED(uint, expert, 1); \
        Product m; \
        m.x = x, m.weights = weights, m.offsets = offsets, m.tiles = tiles, m.y = y; \
        m.left = left, m.right = right, m.expert = expert; \
        multiply<rows, transposed>(m, p, BLOCK_X *COLUMNS, BLOCK_Y, THREAD); \
    }

// y = x Wᵀ
EXPERT_PRODUCT(experts_forward_16, 16, true)
EXPERT_PRODUCT(experts_forward_64, 64, true)
// y = scale * x W
EXPERT_PRODUCT(experts_backward_16, 16, false)
EXPERT_PRODUCT(experts_backward_64, 64, false)
