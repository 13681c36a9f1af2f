// Shared-prefix attention on CUDA's tensor cores, for heads of up to 64 and of up to 128 elements of 16 bits, a multiple
// of 8: the kernels of attention.cu with the same buffers and parameters, in the manner of FlashAttention-2
// (arXiv:2307.08691). A smaller head's missing columns are zeros in shared memory, and are not stored.
//
// A block has 4 warps; each owns 16 rows of the tile (queries, or keys for dK and dV), so that scores and sums stay in
// its registers: the result of a product, packed to 16 bits, is the left operand of the next. Tiles are
// copied asynchronously; their 16-byte chunks are swizzled so that 8 rows' same chunk is in 8 different banks.
//
// Reading operands from shared memory bounds such kernels. If an even number of query heads shares a key head, the
// kernels by queries process two of them at a time (`HEADS`): a warp owns its 16 queries' rows in both, and each key and
// value that it reads feeds twice the products. Tiles of twice the queries would do so too, but they cover more keys to
// which only some of their queries attend.
//
// A warp leaves out groups of 16 keys to which none of its queries attends, and masks nothing if all attend to all.

#if defined(ELEMENT_BF16) || defined(ELEMENT_F16)

struct AttentionParameters {
    uint heads, kv_heads, head_dim;
    uint q_width, kv_width, kv_column, prefix_width, prefix_column, queries;
    float scale;
    uint dq_width, dkv_width, dkv_column, aligned, rotated;
};

#define BLOCK 128
// Rows of a tile.
#define ROWS 64
#define LOG2_E 1.4426950408889634f
// Less than any score; finite, so that no difference is NaN.
#define LOWEST (-1e30f)

#if defined(__CUDACC__)
INLINE float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
INLINE float exp2_(float x) { return exp2f(x); }
#endif

struct Inputs {
    GLOBAL(const Element) q;
    GLOBAL(const Element) kv;
    GLOBAL(const Element) prefix;
    GLOBAL(const uint) visible;
    GLOBAL(const Element) dout;
    GLOBAL(const float) lse;
    GLOBAL(const float) delta;
};

// The rotation of queries and keys (rope.cu), which gradients go back through; of heads of D columns alone.
struct Rotation {
    GLOBAL(const float) cos;
    GLOBAL(const float) sin;
    GLOBAL(const uint) positions;
    bool on;
};

INLINE uint smaller(uint a, uint b) { return a < b ? a : b; }
INLINE uint larger(uint a, uint b) { return a > b ? a : b; }

// Where 8 elements of a row lie in a tile of rows of D elements.
template <uint D>
INLINE uint swizzled(uint row, uint chunk) {
    return row * D + (chunk ^ (row % 8)) * 8;
}

// Starts copying `count` rows of a head, the first at `from`, and zeros after them and after its `head_dim` columns.
// Missing elements are not read.
template <uint D, uint COUNT>
INLINE void copy_rows(GROUP(Element) to, GLOBAL(const Element) from, uint width, uint head_dim, uint count, uint thread) {
    const uint chunk = thread % (D / 8), row = thread / (D / 8), step = BLOCK / (D / 8);
    if (8 * chunk >= head_dim) count = 0;
    GLOBAL(const Element) next = from + ((index_t)row * width + chunk * 8);
    UNROLL for (uint i = 0; i < COUNT / step; ++i) {
        cp_async16(to + (swizzled<D>(row, chunk) + step * i * D), next, row + step * i < count);
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

// Groups of 16 rows of the other operand in which a warp takes part, [begin, end); `all` if nothing is masked.
struct Groups {
    uint begin, end;
    bool all;
};
INLINE bool takes(Groups groups, uint group) { return groups.all || (group >= groups.begin && group < groups.end); }

// The left operand of 16 rows of each of HEADS tiles, which lie one after another: read for each step, or once if
// registers allow.
template <uint D, uint HEADS>
struct Tiles {
    GROUP(const Element) tile;
    uint row;
};
template <uint D, uint HEADS>
struct Fragments {
    uint of[HEADS][D / 16][4];
};
template <uint D, uint HEADS>
INLINE void load_left(LOCAL(uint) r, const Tiles<D, HEADS> &from, uint head, uint step, uint lane) {
    left<D>(r, from.tile + head * (ROWS * D), from.row, step, lane);
}
template <uint D, uint HEADS>
INLINE void load_left(LOCAL(uint) r, const Fragments<D, HEADS> &from, uint head, uint step, uint) {
    UNROLL for (uint i = 0; i < 4; ++i) r[i] = from.of[head][step][i];
}
template <uint D, uint HEADS>
INLINE void hold(Tiles<D, HEADS> &to, const Tiles<D, HEADS> &from, uint) { to = from; }
template <uint D, uint HEADS>
INLINE void hold(Fragments<D, HEADS> &to, const Tiles<D, HEADS> &from, uint lane) {
    UNROLL for (uint head = 0; head < HEADS; ++head)
        UNROLL for (uint step = 0; step < D / 16; ++step) load_left(to.of[head][step], from, head, step, lane);
}

// How the kernels hold queries (of the forward pass, of dQ) and their gradients (of dQ).
template <uint D, uint HEADS>
struct Held {
    typedef Tiles<D, HEADS> queries, dq_queries, douts;
};
// How the dK and dV kernel holds keys and values.
template <uint D>
struct HeldKeys {
    typedef Fragments<D, 1> keys;
    typedef Tiles<D, 1> values;
};
template <>
struct HeldKeys<64> {
    typedef Fragments<64, 1> keys, values;
};
template <>
struct Held<64, 2> {
    typedef Fragments<64, 2> queries, dq_queries;
    typedef Fragments<64, 2> douts;
};

// out[16 rows of a, 16 GROUPS rows of b] = a b^T for each head; of groups left out zeros, or products that the caller
// masks. One group of four is not left out: its products cost less than reading `a` once for each of the three.
template <uint D, uint GROUPS, uint HEADS, typename Left>
INLINE void products(const Left &a, GROUP(const Element) b, uint b_row, Groups groups, uint lane,
                     float (&out)[HEADS][8 * GROUPS]) {
    UNROLL for (uint head = 0; head < HEADS; ++head)
        UNROLL for (uint i = 0; i < 8 * GROUPS; ++i) out[head][i] = 0.0f;
    if (groups.all || (GROUPS > 2 && groups.end - groups.begin + 1 >= GROUPS)) {
        UNROLL for (uint step = 0; step < D / 16; ++step) {
            uint x[HEADS][4];
            UNROLL for (uint head = 0; head < HEADS; ++head) load_left(x[head], a, head, step, lane);
            UNROLL for (uint g = 0; g < GROUPS; ++g) {
                uint y[4];
                right<D>(y, b, b_row + 16 * g, step, lane);
                UNROLL for (uint head = 0; head < HEADS; ++head) {
                    mma_16x8x16(out[head] + 8 * g, x[head], y);
                    mma_16x8x16(out[head] + 8 * g + 4, x[head], y + 2);
                }
            }
        }
        return;
    }
    UNROLL for (uint g = 0; g < GROUPS; ++g) {
        if (!takes(groups, g)) continue;
        UNROLL for (uint step = 0; step < D / 16; ++step) {
            uint y[4];
            right<D>(y, b, b_row + 16 * g, step, lane);
            UNROLL for (uint head = 0; head < HEADS; ++head) {
                uint x[4];
                load_left(x, a, head, step, lane);
                mma_16x8x16(out[head] + 8 * g, x, y);
                mma_16x8x16(out[head] + 8 * g + 4, x, y + 2);
            }
        }
    }
}

// Adds w[16, 16 GROUPS] x[16 GROUPS rows, D] to each head's `sums`; `w` lies as `products` leaves it.
template <uint D, uint GROUPS, uint HEADS>
INLINE void accumulate(const float (&w)[HEADS][8 * GROUPS], GROUP(const Element) x, uint row, Groups groups, uint lane,
                       float (&sums)[HEADS][D / 2]) {
    UNROLL for (uint g = 0; g < GROUPS; ++g) {
        if (!takes(groups, g)) continue;
        uint a[HEADS][4];
        UNROLL for (uint head = 0; head < HEADS; ++head)
            UNROLL for (uint i = 0; i < 4; ++i)
                a[head][i] = pack2(w[head][8 * g + 2 * i], w[head][8 * g + 2 * i + 1]);
        UNROLL for (uint step = 0; step < D / 16; ++step) {
            uint b[4];
            right_columns<D>(b, x, row + 16 * g, step, lane);
            UNROLL for (uint head = 0; head < HEADS; ++head) {
                mma_16x8x16(sums[head] + 8 * step, a[head], b);
                mma_16x8x16(sums[head] + 8 * step + 4, a[head], b + 2);
            }
        }
    }
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

// Where a warp stores its 16 rows: the first row, the width of a row, how many rows and columns there are.
template <typename T>
struct Target {
    GLOBAL(T) to;
    uint width, count, columns;
};

// The lane's 8 columns of block `block` of 32 of a row.
INLINE void columns_of(LOCAL(const float) sums, float factor, uint half, uint block, uint lane, LOCAL(float) out) {
    float pairs[8];
    UNROLL for (uint i = 0; i < 8; ++i) pairs[i] = factor * sums[16 * block + 4 * (i / 2) + 2 * half + i % 2];
    gather_columns(pairs, lane, out);
}

// Stores a warp's 16 rows, times a factor for the upper and the lower 8. With a rotation, column i of a head's first half
// and of its second are rotated back by their angle; `first` is the first row's index among the positions.
template <uint D, typename T>
INLINE void store_rows(Target<T> t, Rotation rotation, uint first, LOCAL(const float) sums, LOCAL(const float) factors,
                       uint lane) {
    UNROLL for (uint half = 0; half < 2; ++half) {
        const uint row = lane / 4 + 8 * half;
        UNROLL for (uint block = 0; block < D / 64; ++block) {
            const uint column = 32 * block + lane % 4 * 8;
            float low[8], high[8];
            columns_of(sums, factors[half], half, block, lane, low);
            columns_of(sums, factors[half], half, block + D / 64, lane, high);
            if (row >= t.count) continue;
            if (rotation.on) {
                const index_t at = (index_t)rotation.positions[first + row] * (D / 2) + column;
                float cos[8], sin[8];
                load8(rotation.cos, at, 8, true, cos);
                load8(rotation.sin, at, 8, true, sin);
                UNROLL for (uint i = 0; i < 8; ++i) {
                    const float x = low[i], y = high[i];
                    low[i] = x * cos[i] + y * sin[i];
                    high[i] = y * cos[i] - x * sin[i];
                }
            }
            const index_t at = (index_t)row * t.width + column;
            if (column < t.columns) store8(t.to, at, 8, true, low);
            if (column + D / 2 < t.columns) store8(t.to, at + D / 2, 8, true, high);
        }
    }
}

// The rows that a tile reads: the prefix's, then own rows. Rows are counted from the first of the prefix, or of the own
// rows.
struct Walk {
    uint prefix, prefix_count, own, own_count;
};

// The step's rows begin at `at`; no rows are left if that is the end of the own rows.
struct Step {
    uint at;
    bool own;
};

INLINE Walk walk_of(GLOBAL(const uint) tile) {
    Walk w;
    w.prefix = tile[2];
    w.prefix_count = tile[3] - w.prefix;
    w.own = tile[4];
    w.own_count = tile[5] - w.own;
    return w;
}

INLINE Step first_step(Walk w) {
    const Step s = {0, w.prefix_count == 0};
    return s;
}
INLINE Step step_after(Step step, Walk w, uint rows) {
    step.at += rows;
    if (!step.own && step.at >= w.prefix_count) {
        step.at = 0;
        step.own = true;
    }
    return step;
}
INLINE bool goes_on(Step step, Walk w) { return !step.own || step.at < w.own_count; }

// Starts copying a step's keys, or its values.
template <uint D, uint COUNT>
INLINE void copy_step(GROUP(Element) to, Inputs in, GIVEN(AttentionParameters) p, Walk w, Step step, uint kv_head, bool values,
                      uint thread) {
    const uint width = step.own ? p.kv_width : p.prefix_width, row = (step.own ? w.own : w.prefix) + step.at;
    const uint column = (step.own ? p.kv_column : p.prefix_column) + (kv_head + (values ? p.kv_heads : 0)) * p.head_dim;
    const uint count = (step.own ? w.own_count : w.prefix_count) - step.at;
    GLOBAL(const Element) from = (step.own ? in.kv : in.prefix) + ((index_t)row * width + column);
    copy_rows<D, COUNT>(to, from, width, p.head_dim, count, thread);
}

// The own rows that a lane's two queries see, and from the first to the last that one of the warp's does.
struct Seen {
    uint from[2], to[2];
    uint low, high;
};

// The visible rows of a warp's queries from `first` on; queries after the tile's `last` count as the last. Own rows are
// counted from `base`.
INLINE Seen seen_by(GLOBAL(const uint) visible, uint first, uint last, uint base, uint lane) {
    Seen s;
    // Small numbers, which a float holds exactly: a tile's own rows are few.
    float low = 1e9f, high = 0.0f;
    UNROLL for (uint i = 0; i < 2; ++i) {
        const index_t query = smaller(first + lane / 4 + 8 * i, last);
        s.from[i] = visible[2 * query] - base;
        s.to[i] = visible[2 * query + 1] - base;
        low = min_(low, (float)s.from[i]);
        high = max_(high, (float)s.to[i]);
    }
    UNROLL for (uint mask = 4; mask < 32; mask *= 2) {
        low = min_(low, shuffle_xor(low, mask));
        high = max_(high, shuffle_xor(high, mask));
    }
    s.low = (uint)low;
    s.high = (uint)high;
    return s;
}

// The groups of keys `at` to `at + rows` of a step that a warp multiplies; none if it has no queries.
INLINE Groups groups_of(Seen seen, Walk w, bool own, uint at, uint rows, bool queries) {
    Groups g;
    if (own) {
        const bool both = larger(seen.from[0], seen.from[1]) <= at && smaller(seen.to[0], seen.to[1]) >= at + rows;
        float hidden = both ? 0.0f : 1.0f;
        UNROLL for (uint mask = 4; mask < 32; mask *= 2) hidden = max_(hidden, shuffle_xor(hidden, mask));
        g.all = hidden == 0.0f;
    } else {
        g.all = w.prefix_count >= at + rows;
    }
    const uint low = own ? seen.low : 0, high = own ? seen.high : w.prefix_count;
    g.begin = low > at ? (low - at) / 16 : 0;
    g.end = high > at ? smaller(rows / 16, (high - at + 15) / 16) : 0;
    if (!queries) {
        g.all = false;
        g.end = 0;
    }
    return g;
}
INLINE bool nothing(Groups g) { return !g.all && g.begin >= g.end; }

// The keys of a step to which a lane's two queries attend: those whose distance from the lane's first key, less `before`,
// is under `count`. Without branches, as most steps over own rows are masked.
struct Mask {
    uint before[2], count[2];
};
INLINE Mask mask_of(Seen seen, Walk w, bool own, uint at, uint lane) {
    Mask m;
    UNROLL for (uint i = 0; i < 2; ++i) {
        const uint from = own ? seen.from[i] : 0, to = own ? seen.to[i] : w.prefix_count;
        m.before[i] = from - at - lane % 4 * 2;
        m.count[i] = to - from;
    }
    return m;
}
// Whether the query of element i of the scores attends to its key.
INLINE bool sees(Mask m, uint i) {
    const uint key = i / 4 * 8 + i % 2, row = i / 2 % 2;
    return key - m.before[row] < m.count[row];
}

// Starts copying a tile's rows of HEADS heads, each into a tile of its own.
template <uint D, uint HEADS>
INLINE void copy_heads(GROUP(Element) to, GLOBAL(const Element) from, uint width, uint head_dim, uint count, uint thread) {
    UNROLL for (uint head = 0; head < HEADS; ++head)
        copy_rows<D, ROWS>(to + head * (ROWS * D), from + head * head_dim, width, head_dim, count, thread);
}

// The running softmax of a lane's two queries: makes weights of the scores.
struct Softmax {
    float largest[2], total[2];
};
template <uint D, uint KEYS>
INLINE void weigh(Softmax &state, float (&s)[KEYS / 2], float (&sums)[D / 2], float scale) {
    UNROLL for (uint half = 0; half < 2; ++half) {
        float top = state.largest[half], sum = 0.0f;
        UNROLL for (uint e = 0; e < KEYS / 4; ++e) top = max_(top, s[e / 2 * 4 + 2 * half + e % 2]);
        top = max_(top, shuffle_xor(top, 1));
        top = max_(top, shuffle_xor(top, 2));
        const float factor = exp2_((state.largest[half] - top) * scale), less = top * scale;
        UNROLL for (uint e = 0; e < KEYS / 4; ++e) {
            const uint at = e / 2 * 4 + 2 * half + e % 2;
            s[at] = exp2_(s[at] * scale - less);
            sum += s[at];
        }
        state.total[half] = state.total[half] * factor + sum;
        state.largest[half] = top;
        UNROLL for (uint e = 0; e < D / 4; ++e) sums[e / 2 * 4 + 2 * half + e % 2] *= factor;
    }
}

template <uint D, uint HEADS>
INLINE void forward(Inputs in, GLOBAL(const uint) tile, GLOBAL(Element) out, GLOBAL(float) lse, GIVEN(AttentionParameters) p,
                    GROUP(Element) memory, uint head, uint thread) {
    const uint lane = thread % 32, row = thread / 32 * 16, kv_head = head / (p.heads / p.kv_heads);
    const uint all = tile[1] - tile[0], count = all > row ? smaller(16, all - row) : 0;
    GROUP(Element) keys = memory + HEADS * ROWS * D;
    GROUP(Element) values = keys + ROWS * D;
    const Walk w = walk_of(tile);
    GLOBAL(const Element) q = in.q + ((index_t)tile[0] * p.q_width + head * p.head_dim);
    copy_heads<D, HEADS>(memory, q, p.q_width, p.head_dim, all, thread);
    copy_step<D, ROWS>(keys, in, p, w, first_step(w), kv_head, false, thread);
    cp_async_commit();
    const Seen seen = seen_by(in.visible, tile[0] + row, tile[1] - 1, w.own, lane);
    float sums[HEADS][D / 2];
    Softmax state[HEADS];
    UNROLL for (uint h = 0; h < HEADS; ++h) {
        state[h] = {{LOWEST, LOWEST}, {0.0f, 0.0f}};
        UNROLL for (uint i = 0; i < D / 2; ++i) sums[h][i] = 0.0f;
    }
    cp_async_wait(0);
    BARRIER(); // The queries are there.
    typename Held<D, HEADS>::queries queries;
    hold(queries, Tiles<D, HEADS>{memory, row}, lane);
    Step next = first_step(w);
    while (goes_on(next, w)) {
        const Step step = next;
        next = step_after(step, w, ROWS);
        cp_async_wait(0);
        BARRIER(); // The keys are there, and nobody needs the last values.
        copy_step<D, ROWS>(values, in, p, w, step, kv_head, true, thread);
        cp_async_commit();
        const Groups groups = groups_of(seen, w, step.own, step.at, ROWS, count > 0);
        float s[HEADS][ROWS / 2];
        if (!nothing(groups)) {
            products<D, ROWS / 16>(queries, keys, 0, groups, lane, s);
            if (!groups.all) {
                const Mask mask = mask_of(seen, w, step.own, step.at, lane);
                UNROLL for (uint e = 0; e < ROWS / 2; ++e) {
                    const bool is_seen = sees(mask, e);
                    UNROLL for (uint h = 0; h < HEADS; ++h) s[h][e] = is_seen ? s[h][e] : NEGATIVE_INFINITY;
                }
            }
        }
        cp_async_wait(0);
        BARRIER(); // The values are there, and nobody needs the keys.
        if (goes_on(next, w)) copy_step<D, ROWS>(keys, in, p, w, next, kv_head, false, thread);
        cp_async_commit();
        if (nothing(groups)) continue;
        UNROLL for (uint h = 0; h < HEADS; ++h) weigh<D, ROWS>(state[h], s[h], sums[h], p.scale * LOG2_E);
        accumulate<D, ROWS / 16>(s, values, 0, groups, lane, sums);
    }
    cp_async_wait(0);
    const Rotation none = {in.lse, in.lse, in.visible, false};
    UNROLL for (uint h = 0; h < HEADS; ++h) {
        UNROLL for (uint half = 0; half < 2; ++half) {
            float &total = state[h].total[half];
            total += shuffle_xor(total, 1);
            total += shuffle_xor(total, 2);
            const uint r = lane / 4 + 8 * half;
            if (r < count && lane % 4 == 0)
                lse[(index_t)(tile[0] + row + r) * p.heads + head + h] = state[h].largest[half] * p.scale + log_(total);
            total = total > 0.0f ? 1.0f / total : 0.0f;
        }
        const uint width = p.heads * p.head_dim;
        GLOBAL(Element) to = out + ((index_t)(tile[0] + row) * width + (head + h) * p.head_dim);
        const Target<Element> target = {to, width, count, p.head_dim};
        store_rows<D>(target, none, 0, sums[h], state[h].total, lane);
    }
}

// Rows of the tiles that the backward kernels read; two of each are in shared memory: one is copied while the other is
// used, PART rows at a time.
template <uint D>
struct Stage {
    enum : uint { rows = D > 64 ? 32 : 64 };
};
#define PART 32

// The shared memory of the dQ kernel.
struct QueryShared {
    GROUP(Element) queries;
    GROUP(Element) douts;
    GROUP(Element) keys;
    GROUP(Element) values;
    // lse (times log2 e) of each query of each head, then delta: registers are scarce.
    GROUP(float) columns;
};

// delta of a lane's query, the sum of out * dout: `out` is the query's first element, `dout` its tile's row. Four lanes
// share a query.
template <uint D>
INLINE float delta_of(GLOBAL(const Element) out, GROUP(const Element) douts, uint row, uint columns, uint lane) {
    float sum = 0.0f;
    UNROLL for (uint i = 0; i < D / 32; ++i) {
        const uint chunk = lane % 4 + 4 * i;
        if (8 * chunk >= columns) continue;
        float x[8], y[8];
        load8(out, 8 * chunk, 8, true, x);
        load8(douts, swizzled<D>(row, chunk), 8, true, y);
        UNROLL for (uint k = 0; k < 8; ++k) sum += x[k] * y[k];
    }
    sum += shuffle_xor(sum, 1);
    return sum + shuffle_xor(sum, 2);
}

// The outputs of the dQ kernel: dQ, and delta for the dK and dV kernel after it.
struct QueryOutputs {
    GLOBAL(const Element) out;
    GLOBAL(float) delta;
    GLOBAL(Element) dq;
};

template <uint D, uint HEADS>
INLINE void query_gradients(Inputs in, GLOBAL(const uint) tile, QueryOutputs made, Rotation rotation,
                            GIVEN(AttentionParameters) p, QueryShared s, uint head, uint thread) {
    const uint rows = Stage<D>::rows;
    const uint lane = thread % 32, row = thread / 32 * 16, kv_head = head / (p.heads / p.kv_heads);
    const uint first = tile[0] + row, all = tile[1] - tile[0], count = all > row ? smaller(16, all - row) : 0;
    const Walk w = walk_of(tile);
    const uint width = p.heads * p.head_dim, column = head * p.head_dim;
    GLOBAL(const Element) q = in.q + ((index_t)tile[0] * p.q_width + column);
    copy_heads<D, HEADS>(s.queries, q, p.q_width, p.head_dim, all, thread);
    GLOBAL(const Element) dout = in.dout + ((index_t)tile[0] * width + column);
    copy_heads<D, HEADS>(s.douts, dout, width, p.head_dim, all, thread);
    copy_step<D, rows>(s.keys, in, p, w, first_step(w), kv_head, false, thread);
    copy_step<D, rows>(s.values, in, p, w, first_step(w), kv_head, true, thread);
    cp_async_commit();
    const Seen seen = seen_by(in.visible, first, tile[1] - 1, w.own, lane);
    const float scale = p.scale * LOG2_E;
    float sums[HEADS][D / 2];
    cp_async_wait(0);
    BARRIER(); // Queries and gradients are there.
    typename Held<D, HEADS>::dq_queries queries;
    typename Held<D, HEADS>::douts douts;
    hold(queries, Tiles<D, HEADS>{s.queries, row}, lane);
    hold(douts, Tiles<D, HEADS>{s.douts, row}, lane);
    UNROLL for (uint h = 0; h < HEADS; ++h) {
        UNROLL for (uint half = 0; half < 2; ++half) {
            const uint r = lane / 4 + 8 * half;
            const bool there = r < count;
            const index_t at = (index_t)(first + r) * p.heads + head + h;
            GLOBAL(const Element) out = made.out + at * p.head_dim;
            const float delta = delta_of<D>(out, s.douts + h * (ROWS * D), row + r, there ? p.head_dim : 0, lane);
            if (lane % 4 != 0) continue; // Read after the loop's barrier.
            s.columns[2 * h * ROWS + row + r] = there ? in.lse[at] * LOG2_E : 0.0f;
            s.columns[(2 * h + 1) * ROWS + row + r] = delta;
            if (there) made.delta[at] = delta;
        }
        UNROLL for (uint i = 0; i < D / 2; ++i) sums[h][i] = 0.0f;
    }
    Step next = first_step(w);
    for (uint stage = 0; goes_on(next, w); stage = rows - stage) {
        const Step step = next;
        next = step_after(step, w, rows);
        cp_async_wait(0);
        BARRIER(); // This step's rows are there, and nobody needs the last step's.
        if (goes_on(next, w)) {
            const uint to = (rows - stage) * D;
            copy_step<D, rows>(s.keys + to, in, p, w, next, kv_head, false, thread);
            copy_step<D, rows>(s.values + to, in, p, w, next, kv_head, true, thread);
        }
        cp_async_commit();
        UNROLL for (uint part = 0; part < rows; part += PART) {
            const Groups groups = groups_of(seen, w, step.own, step.at + part, PART, count > 0);
            if (nothing(groups)) continue;
            const uint from = stage + part;
            float ds[HEADS][PART / 2], dp[HEADS][PART / 2];
            products<D, PART / 16>(queries, s.keys, from, groups, lane, ds);
            products<D, PART / 16>(douts, s.values, from, groups, lane, dp);
            UNROLL for (uint h = 0; h < HEADS; ++h)
                UNROLL for (uint half = 0; half < 2; ++half) {
                    const uint at = 2 * h * ROWS + row + lane / 4 + 8 * half;
                    const float less = s.columns[at], delta = s.columns[at + ROWS];
                    UNROLL for (uint i = 0; i < PART / 4; ++i) {
                        const uint e = i / 2 * 4 + 2 * half + i % 2;
                        ds[h][e] = exp2_(ds[h][e] * scale - less) * (dp[h][e] - delta);
                    }
                }
            if (!groups.all) {
                const Mask mask = mask_of(seen, w, step.own, step.at + part, lane);
                UNROLL for (uint e = 0; e < PART / 2; ++e) {
                    const bool is_seen = sees(mask, e);
                    UNROLL for (uint h = 0; h < HEADS; ++h) ds[h][e] = is_seen ? ds[h][e] : 0.0f;
                }
            }
            accumulate<D, PART / 16>(ds, s.keys, from, groups, lane, sums);
        }
    }
    cp_async_wait(0);
    const float factors[2] = {p.scale, p.scale};
    UNROLL for (uint h = 0; h < HEADS; ++h) {
        GLOBAL(Element) to = made.dq + ((index_t)first * p.dq_width + (head + h) * p.head_dim);
        const Target<Element> target = {to, p.dq_width, count, p.head_dim};
        store_rows<D>(target, rotation, first, sums[h], factors, lane);
    }
}

// The shared memory of the dK and dV kernel: two tiles of queries, of which one is copied while the other is used.
struct KeyShared {
    GROUP(Element) keys;
    GROUP(Element) values;
    GROUP(Element) queries;
    GROUP(Element) douts;
    // lse (times log2 e) of each query, then delta.
    GROUP(float) columns;
};

// Some queries of an item in one head; the heads of a group come one after another.
struct Turn {
    uint head, first;
};

template <uint D>
INLINE uint count_of(Turn t, uint end) {
    return smaller(Stage<D>::rows, end - t.first);
}

template <uint D>
INLINE void copy_turn(Inputs in, GIVEN(AttentionParameters) p, KeyShared s, Turn t, uint count, uint stage, uint thread) {
    const uint rows = Stage<D>::rows, width = p.heads * p.head_dim, to = stage * rows * D, column = t.head * p.head_dim;
    GLOBAL(const Element) q = in.q + ((index_t)t.first * p.q_width + column);
    copy_rows<D, rows>(s.queries + to, q, p.q_width, p.head_dim, count, thread);
    GLOBAL(const Element) dout = in.dout + ((index_t)t.first * width + column);
    copy_rows<D, rows>(s.douts + to, dout, width, p.head_dim, count, thread);
}

// The thread's one of lse (times log2 e) and delta.
template <uint D>
INLINE float column_of(Inputs in, GIVEN(AttentionParameters) p, Turn t, uint count, uint thread) {
    const uint rows = Stage<D>::rows, query = thread % rows;
    if (thread >= 2 * rows || query >= count) return 0.0f;
    const index_t at = (index_t)(t.first + query) * p.heads + t.head;
    return thread < rows ? in.lse[at] * LOG2_E : in.delta[at];
}

// Which of PART queries from `first` on see a warp's 16 keys: groups of 16 queries.
INLINE Groups groups_of_queries(GLOBAL(const uint) visible, uint first, uint count, uint key, uint lane) {
    float some = 0.0f, hidden = 1.0f;
    if (lane < count) {
        const uint from = visible[2 * (index_t)(first + lane)], to = visible[2 * (index_t)(first + lane) + 1];
        some = from < key + 16 && to > key ? 1.0f : 0.0f;
        hidden = from <= key && to >= key + 16 ? 0.0f : 1.0f;
    }
    UNROLL for (uint mask = 1; mask < 16; mask *= 2) {
        some = max_(some, shuffle_xor(some, mask));
        hidden = max_(hidden, shuffle_xor(hidden, mask));
    }
    const float other = shuffle_xor(some, 16);
    hidden = max_(hidden, shuffle_xor(hidden, 16));
    const bool lower = (lane < 16 ? some : other) > 0.0f, upper = (lane < 16 ? other : some) > 0.0f;
    Groups g;
    g.all = hidden == 0.0f;
    g.begin = lower ? 0 : 1;
    g.end = upper ? 2 : 1;
    return g;
}

// PART queries: the place of the first in the tiles of queries and in `columns`, its row, and the number of queries left.
struct Part {
    uint place, column, first, count;
};

// Which elements of a lane's products of keys from `key` on (the lane's own two: that one and 8 on) and the queries of a
// part are of a query that sees the key: a bit each. The ranges are read before the products, and take one register.
INLINE uint seen_bits(GLOBAL(const uint) visible, Part part, uint key, uint lane) {
    uint bits = 0;
    UNROLL for (uint i = 0; i < PART / 4; ++i) {
        const uint query = i / 2 * 8 + lane % 4 * 2 + i % 2, at = part.first + smaller(query, part.count - 1);
        const uint from = visible[2 * (index_t)at], to = query < part.count ? visible[2 * (index_t)at + 1] : 0;
        const uint count = to > from ? to - from : 0, place = i / 2 * 4 + i % 2;
        bits |= uint(key - from < count) << place | uint(key + 8 - from < count) << (place + 2);
    }
    return bits;
}

// A warp's 16 keys and values, which are from `key` on in all, and the sums of their gradients.
template <uint D>
struct Keys {
    typename HeldKeys<D>::keys keys;
    typename HeldKeys<D>::values values;
    uint key;
    float dk[1][D / 2], dv[1][D / 2];
};

// Adds their share to the gradients of a warp's keys.
template <uint D>
INLINE void add_queries(Inputs in, KeyShared s, Part part, Groups groups, float scale, uint lane, Keys<D> &to) {
    float w[1][PART / 2], dp[1][PART / 2];
    uint bits = 0;
    if (!groups.all) bits = seen_bits(in.visible, part, to.key + lane / 4, lane);
    products<D, PART / 16>(to.keys, s.queries, part.place, groups, lane, w);
    UNROLL for (uint e = 0; e < PART / 2; ++e) {
        const uint query = e / 4 * 8 + lane % 4 * 2 + e % 2;
        w[0][e] = exp2_(w[0][e] * scale - s.columns[part.column + query]);
    }
    if (!groups.all)
        UNROLL for (uint e = 0; e < PART / 2; ++e) w[0][e] = bits >> e & 1 ? w[0][e] : 0.0f;
    accumulate<D, PART / 16>(w, s.douts, part.place, groups, lane, to.dv);
    products<D, PART / 16>(to.values, s.douts, part.place, groups, lane, dp);
    UNROLL for (uint e = 0; e < PART / 2; ++e) {
        const uint query = e / 4 * 8 + lane % 4 * 2 + e % 2;
        w[0][e] *= dp[0][e] - s.columns[part.column + Stage<D>::rows + query];
    }
    accumulate<D, PART / 16>(w, s.queries, part.place, groups, lane, to.dk);
}

// Rows that only their own segment sees are written to dkv; sums over some queries to their slot of `partials`.
struct KeyOutputs {
    GLOBAL(Element) dkv;
    GLOBAL(float) partials;
};

template <uint D>
INLINE void key_gradients(Inputs in, GLOBAL(const uint) item, KeyOutputs made, Rotation rotation,
                          GIVEN(AttentionParameters) p, KeyShared s, uint kv_head, uint thread) {
    const uint lane = thread % 32, row = thread / 32 * 16, rows = Stage<D>::rows;
    const uint key = item[0], all = item[1] - key, count = all > row ? smaller(16, all - row) : 0;
    const uint end = item[3], first_head = kv_head * (p.heads / p.kv_heads), to_values = p.kv_heads * p.head_dim;
    const bool causal = item[4] != 2;
    Keys<D> keys;
    keys.key = key + row;
    UNROLL for (uint i = 0; i < D / 2; ++i) keys.dk[0][i] = keys.dv[0][i] = 0.0f;
    Turn turn = {first_head, item[2]};
    if (turn.first < end) {
        const uint width = causal ? p.kv_width : p.prefix_width;
        const uint column = (causal ? p.kv_column : p.prefix_column) + kv_head * p.head_dim;
        GLOBAL(const Element) from = (causal ? in.kv : in.prefix) + ((index_t)key * width + column);
        copy_rows<D, ROWS>(s.keys, from, width, p.head_dim, all, thread);
        copy_rows<D, ROWS>(s.values, from + to_values, width, p.head_dim, all, thread);
        copy_turn<D>(in, p, s, turn, count_of<D>(turn, end), 0, thread);
        if (thread < 2 * rows) s.columns[thread] = column_of<D>(in, p, turn, count_of<D>(turn, end), thread);
    }
    cp_async_commit();
    if (turn.first < end) {
        cp_async_wait(0);
        BARRIER(); // Keys and values are there.
        hold(keys.keys, Tiles<D, 1>{s.keys, row}, lane);
        hold(keys.values, Tiles<D, 1>{s.values, row}, lane);
    }
    for (uint stage = 0; turn.first < end; stage = 1 - stage) {
        Turn next = {turn.head + 1, turn.first};
        if (next.head == first_head + p.heads / p.kv_heads) {
            next.head = first_head;
            next.first += rows;
        }
        const bool more = next.first < end;
        float next_column = 0.0f;
        cp_async_wait(0);
        BARRIER(); // This round's rows are copied, and the last round's are not needed any more.
        if (more) {
            copy_turn<D>(in, p, s, next, count_of<D>(next, end), 1 - stage, thread);
            next_column = column_of<D>(in, p, next, count_of<D>(next, end), thread);
        }
        cp_async_commit();
        UNROLL for (uint query = 0; query < rows; query += PART) {
            const uint left = end - turn.first;
            if (count == 0 || query >= left) continue;
            const Part part = {stage * rows + query, stage * 2 * rows + query, turn.first + query, left - query};
            Groups groups = {0, PART / 16, true};
            if (causal) groups = groups_of_queries(in.visible, part.first, part.count, key + row, lane);
            if (!nothing(groups))
                add_queries<D>(in, s, part, groups, p.scale * LOG2_E, lane, keys);
        }
        if (more && thread < 2 * rows) s.columns[(1 - stage) * 2 * rows + thread] = next_column;
        turn = next;
    }
    cp_async_wait(0);
    const Rotation none = {rotation.cos, rotation.sin, rotation.positions, false};
    const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
    const uint column = kv_head * p.head_dim;
    if (item[4] == 0) {
        GLOBAL(Element) to = made.dkv + ((index_t)(key + row) * p.dkv_width + p.dkv_column + column);
        const Target<Element> of_keys = {to, p.dkv_width, count, p.head_dim};
        const Target<Element> of_values = {to + to_values, p.dkv_width, count, p.head_dim};
        store_rows<D>(of_keys, rotation, key + row, keys.dk[0], scale, lane);
        store_rows<D>(of_values, none, 0, keys.dv[0], one, lane);
    } else {
        GLOBAL(float) to = made.partials + (((index_t)item[5] * ROWS + row) * (2 * to_values) + column);
        const Target<float> of_keys = {to, 2 * to_values, count, p.head_dim};
        const Target<float> of_values = {to + to_values, 2 * to_values, count, p.head_dim};
        store_rows<D>(of_keys, none, 0, keys.dk[0], scale, lane);
        store_rows<D>(of_values, none, 0, keys.dv[0], one, lane);
    }
}

// Grid: tiles, query heads / HEADS. Shared memory: 2 + HEADS tiles of 64 rows.
#define FORWARD(NAME, D, HEADS, BLOCKS) \
    KERNEL_FITTING(NAME, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, tiles), OUT(5, Element, out), OUT(6, float, lse), \
           PARAMETERS(7, AttentionParameters, p)) { \
        DYNAMIC_SHARED(Element, memory); \
        const Inputs in = {q, kv, prefix, visible, q, lse, lse}; \
        forward<D, HEADS>(in, tiles + 6 * (index_t)BLOCK_X, out, lse, p, memory, HEADS * BLOCK_Y, THREAD); \
    }

// Grid: tiles, query heads / HEADS. Shared memory: 2 HEADS tiles of 64 rows, 4 of keys and values.
#define QUERY_GRADIENTS(NAME, D, HEADS, BLOCKS) \
    KERNEL_FITTING(NAME, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, tiles), IN(5, Element, out), IN(6, Element, dout), IN(7, float, lse), \
           IN(8, float, cos), IN(9, float, sin), IN(10, uint, positions), OUT(11, float, delta), OUT(12, Element, dq), \
           PARAMETERS(13, AttentionParameters, p)) { \
        DYNAMIC_SHARED(Element, memory); \
        const Inputs in = {q, kv, prefix, visible, dout, lse, lse}; \
        DYNAMIC_SHARED(float, floats); \
        GROUP(Element) keys = memory + 2 * HEADS * ROWS * D; \
        const QueryShared s = {memory, memory + HEADS * ROWS * D, keys, keys + 2 * Stage<D>::rows * D, \
                               floats + (HEADS * ROWS + 2 * Stage<D>::rows) * D}; \
        const QueryOutputs made = {out, delta, dq}; \
        const Rotation rotation = {cos, sin, positions, p.rotated != 0}; \
        query_gradients<D, HEADS>(in, tiles + 6 * (index_t)BLOCK_X, made, rotation, p, s, HEADS * BLOCK_Y, THREAD); \
    }

// Grid: items of keys, key heads. Shared memory: 2 tiles of 64 rows, 4 of queries, and 4 floats for each query.
#define KEY_GRADIENTS(D, BLOCKS) \
    KERNEL_FITTING(attention_mma_dkv_##D, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, key_items), IN(5, Element, dout), IN(6, float, lse), \
           IN(7, float, delta), IN(8, float, cos), IN(9, float, sin), IN(10, uint, positions), OUT(11, Element, dkv), \
           OUT(12, float, partials), PARAMETERS(13, AttentionParameters, p)) { \
        DYNAMIC_SHARED(Element, memory); \
        DYNAMIC_SHARED(float, floats); \
        const uint queries = Stage<D>::rows * D; \
        const Inputs in = {q, kv, prefix, visible, dout, lse, delta}; \
        const KeyShared s = {memory, memory + ROWS * D, memory + 2 * ROWS * D, memory + 2 * ROWS * D + 2 * queries, \
                             floats + (ROWS * D + 2 * queries)}; \
        const KeyOutputs made = {dkv, partials}; \
        const Rotation rotation = {cos, sin, positions, p.rotated != 0}; \
        key_gradients<D>(in, key_items + 6 * (index_t)BLOCK_X, made, rotation, p, s, BLOCK_Y, THREAD); \
    }

FORWARD(attention_mma_forward_64, 64, 1, 4)
FORWARD(attention_mma_forward_128, 128, 1, 3)
FORWARD(attention_mma_forward_pair_64, 64, 2, 2)
FORWARD(attention_mma_forward_pair_128, 128, 2, 2)
QUERY_GRADIENTS(attention_mma_dq_64, 64, 1, 4)
QUERY_GRADIENTS(attention_mma_dq_128, 128, 1, 3)
QUERY_GRADIENTS(attention_mma_dq_pair_64, 64, 2, 2)
QUERY_GRADIENTS(attention_mma_dq_pair_128, 128, 2, 2)
KEY_GRADIENTS(64, 3)
KEY_GRADIENTS(128, 2)

#endif
