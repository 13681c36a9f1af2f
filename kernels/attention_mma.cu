// Shared-prefix attention on CUDA's tensor cores, for heads of up to 64 and of up to 128 elements of 16 bits, a multiple
// of 8: the kernels of attention.cu with the same buffers and parameters, in the manner of FlashAttention-2
// (arXiv:2307.08691). A smaller head's missing columns are zeros in shared memory, and are not stored.
//
// A block has 4 warps; each owns 16 rows of the tile (queries, or keys for dK and dV), so that scores and sums stay in
// its registers: what a product leaves there is, packed to 16 bits, the left operand of the next. Tiles come by
// asynchronous copies; their 16-byte chunks are swizzled so that 8 rows' same chunk is in 8 different banks.
//
// A warp leaves out groups of 16 keys that none of its queries sees, and masks nothing where all see all.

#if defined(ELEMENT_BF16) || defined(ELEMENT_F16)

struct AttentionParameters {
    uint heads, kv_heads, head_dim;
    uint q_width, kv_width, kv_column, prefix_width, prefix_column, queries;
    float scale;
    uint dq_width, dkv_width, dkv_column, aligned;
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

INLINE uint smaller(uint a, uint b) { return a < b ? a : b; }
INLINE uint larger(uint a, uint b) { return a > b ? a : b; }

// Where 8 elements of a row lie in a tile of rows of D elements.
template <uint D>
INLINE uint swizzled(uint row, uint chunk) {
    return row * D + (chunk ^ (row % 8)) * 8;
}

// Starts copying `count` rows of a head, the first at `from`, and zeros behind them and behind its `head_dim` columns.
// Nothing is read where no element is.
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

// Groups of 16 rows of the other operand that a warp takes part in, [begin, end); `all` where nothing is masked.
struct Groups {
    uint begin, end;
    bool all;
};
INLINE bool takes(Groups groups, uint group) { return groups.all || (group >= groups.begin && group < groups.end); }

// out[16 rows of a, 16 GROUPS rows of b] = a b^T; zeros for groups left out.
template <uint D, uint GROUPS>
INLINE void products(GROUP(const Element) a, uint row, GROUP(const Element) b, uint b_row, Groups groups, uint lane,
                     LOCAL(float) out) {
    UNROLL for (uint i = 0; i < 8 * GROUPS; ++i) out[i] = 0.0f;
    if (groups.all) {
        UNROLL for (uint step = 0; step < D / 16; ++step) {
            uint x[4];
            left<D>(x, a, row, step, lane);
            UNROLL for (uint g = 0; g < GROUPS; ++g) {
                uint y[4];
                right<D>(y, b, b_row + 16 * g, step, lane);
                mma_16x8x16(out + 8 * g, x, y);
                mma_16x8x16(out + 8 * g + 4, x, y + 2);
            }
        }
        return;
    }
    UNROLL for (uint g = 0; g < GROUPS; ++g) {
        if (!takes(groups, g)) continue;
        UNROLL for (uint step = 0; step < D / 16; ++step) {
            uint x[4], y[4];
            left<D>(x, a, row, step, lane);
            right<D>(y, b, b_row + 16 * g, step, lane);
            mma_16x8x16(out + 8 * g, x, y);
            mma_16x8x16(out + 8 * g + 4, x, y + 2);
        }
    }
}

// Adds w[16, 16 GROUPS] x[16 GROUPS rows, D] to `sums`; `w` lies as `products` leaves it.
template <uint D, uint GROUPS>
INLINE void accumulate(LOCAL(const float) w, GROUP(const Element) x, uint row, Groups groups, uint lane,
                       LOCAL(float) sums) {
    UNROLL for (uint g = 0; g < GROUPS; ++g) {
        if (!takes(groups, g)) continue;
        uint a[4];
        UNROLL for (uint i = 0; i < 4; ++i) a[i] = pack2(w[8 * g + 2 * i], w[8 * g + 2 * i + 1]);
        UNROLL for (uint step = 0; step < D / 16; ++step) {
            uint b[4];
            right_columns<D>(b, x, row + 16 * g, step, lane);
            mma_16x8x16(sums + 8 * step, a, b);
            mma_16x8x16(sums + 8 * step + 4, a, b + 2);
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

// Stores a warp's 16 rows, times a factor for the upper and the lower 8.
template <uint D, typename T>
INLINE void store_rows(Target<T> t, LOCAL(const float) sums, LOCAL(const float) factors, uint lane) {
    UNROLL for (uint half = 0; half < 2; ++half) {
        const uint row = lane / 4 + 8 * half;
        UNROLL for (uint block = 0; block < D / 32; ++block) {
            float pairs[8], values[8];
            UNROLL for (uint i = 0; i < 8; ++i)
                pairs[i] = factors[half] * sums[16 * block + 4 * (i / 2) + 2 * half + i % 2];
            gather_columns(pairs, lane, values);
            const uint column = 32 * block + lane % 4 * 8;
            if (row < t.count && column < t.columns) store8(t.to, (index_t)row * t.width + column, 8, true, values);
        }
    }
}

// A tile's walk over the prefix's rows and then over own rows. Rows are counted from the first of the prefix, or of the
// own rows.
struct Walk {
    uint prefix, prefix_count, own, own_count;
};

// The step's rows begin at `at`; none are left where that is the end of the own rows.
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

// Of a warp's queries from `first` on; what is behind the tile's `last` counts as the last. Own rows are counted from
// `base`.
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

// What a warp does with keys `at` to `at + rows` of a step; nothing where it has no queries.
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

// What a lane's two queries see of a step: a key does if its place behind the lane's first one, less `before`, is under
// `count`. Without branches, as most steps over own rows are masked.
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
// Whether the query behind element i of the scores sees its key.
INLINE bool sees(Mask m, uint i) {
    const uint key = i / 4 * 8 + i % 2, row = i / 2 % 2;
    return key - m.before[row] < m.count[row];
}

template <uint D>
INLINE void forward(Inputs in, GLOBAL(const uint) tile, GLOBAL(Element) out, GLOBAL(float) lse, GIVEN(AttentionParameters) p,
                    GROUP(Element) memory, uint head, uint thread) {
    const uint lane = thread % 32, row = thread / 32 * 16, kv_head = head / (p.heads / p.kv_heads);
    const uint all = tile[1] - tile[0], count = all > row ? smaller(16, all - row) : 0;
    GROUP(Element) queries = memory;
    GROUP(Element) keys = memory + ROWS * D;
    GROUP(Element) values = memory + 2 * ROWS * D;
    const Walk w = walk_of(tile);
    GLOBAL(const Element) q = in.q + ((index_t)tile[0] * p.q_width + head * p.head_dim);
    copy_rows<D, ROWS>(queries, q, p.q_width, p.head_dim, all, thread);
    copy_step<D, ROWS>(keys, in, p, w, first_step(w), kv_head, false, thread);
    cp_async_commit();
    const Seen seen = seen_by(in.visible, tile[0] + row, tile[1] - 1, w.own, lane);
    const float scale = p.scale * LOG2_E;
    float sums[D / 2], largest[2] = {LOWEST, LOWEST}, total[2] = {0.0f, 0.0f};
    UNROLL for (uint i = 0; i < D / 2; ++i) sums[i] = 0.0f;
    Step next = first_step(w);
    while (goes_on(next, w)) {
        const Step step = next;
        next = step_after(step, w, ROWS);
        cp_async_wait(0);
        BARRIER(); // The keys are there, and nobody needs the last values.
        copy_step<D, ROWS>(values, in, p, w, step, kv_head, true, thread);
        cp_async_commit();
        const Groups groups = groups_of(seen, w, step.own, step.at, ROWS, count > 0);
        float s[ROWS / 2];
        if (!nothing(groups)) {
            products<D, ROWS / 16>(queries, row, keys, 0, groups, lane, s);
            if (!groups.all) {
                const Mask mask = mask_of(seen, w, step.own, step.at, lane);
                UNROLL for (uint e = 0; e < ROWS / 2; ++e) s[e] = sees(mask, e) ? s[e] : NEGATIVE_INFINITY;
            }
        }
        cp_async_wait(0);
        BARRIER(); // The values are there, and nobody needs the keys.
        if (goes_on(next, w)) copy_step<D, ROWS>(keys, in, p, w, next, kv_head, false, thread);
        cp_async_commit();
        if (nothing(groups)) continue;
        UNROLL for (uint half = 0; half < 2; ++half) {
            float top = largest[half], sum = 0.0f;
            UNROLL for (uint e = 0; e < ROWS / 4; ++e) top = max_(top, s[e / 2 * 4 + 2 * half + e % 2]);
            top = max_(top, shuffle_xor(top, 1));
            top = max_(top, shuffle_xor(top, 2));
            const float factor = exp2_((largest[half] - top) * scale), less = top * scale;
            UNROLL for (uint e = 0; e < ROWS / 4; ++e) {
                const uint at = e / 2 * 4 + 2 * half + e % 2;
                s[at] = exp2_(s[at] * scale - less);
                sum += s[at];
            }
            total[half] = total[half] * factor + sum;
            largest[half] = top;
            UNROLL for (uint e = 0; e < D / 4; ++e) sums[e / 2 * 4 + 2 * half + e % 2] *= factor;
        }
        accumulate<D, ROWS / 16>(s, values, 0, groups, lane, sums);
    }
    UNROLL for (uint half = 0; half < 2; ++half) {
        total[half] += shuffle_xor(total[half], 1);
        total[half] += shuffle_xor(total[half], 2);
        const uint r = lane / 4 + 8 * half;
        if (r < count && lane % 4 == 0)
            lse[(index_t)(tile[0] + row + r) * p.heads + head] = largest[half] * p.scale + log_(total[half]);
        total[half] = total[half] > 0.0f ? 1.0f / total[half] : 0.0f;
    }
    const uint width = p.heads * p.head_dim;
    GLOBAL(Element) to = out + ((index_t)(tile[0] + row) * width + head * p.head_dim);
    const Target<Element> target = {to, width, count, p.head_dim};
    store_rows<D>(target, sums, total, lane);
}

// Rows of the tiles that the backward kernels walk; two of each lie in shared memory, of which one is copied while the
// other is used, PART rows at a time.
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
};

template <uint D>
INLINE void query_gradients(Inputs in, GLOBAL(const uint) tile, GLOBAL(Element) dq, GIVEN(AttentionParameters) p,
                            QueryShared s, uint head, uint thread) {
    const uint rows = Stage<D>::rows;
    const uint lane = thread % 32, row = thread / 32 * 16, kv_head = head / (p.heads / p.kv_heads);
    const uint first = tile[0] + row, all = tile[1] - tile[0], count = all > row ? smaller(16, all - row) : 0;
    const Walk w = walk_of(tile);
    const uint width = p.heads * p.head_dim, column = head * p.head_dim;
    copy_rows<D, ROWS>(s.queries, in.q + ((index_t)tile[0] * p.q_width + column), p.q_width, p.head_dim, all, thread);
    copy_rows<D, ROWS>(s.douts, in.dout + ((index_t)tile[0] * width + column), width, p.head_dim, all, thread);
    copy_step<D, rows>(s.keys, in, p, w, first_step(w), kv_head, false, thread);
    copy_step<D, rows>(s.values, in, p, w, first_step(w), kv_head, true, thread);
    cp_async_commit();
    const Seen seen = seen_by(in.visible, first, tile[1] - 1, w.own, lane);
    const float scale = p.scale * LOG2_E;
    float less[2], delta[2], sums[D / 2];
    UNROLL for (uint half = 0; half < 2; ++half) {
        const uint r = lane / 4 + 8 * half;
        const index_t at = (index_t)(first + r) * p.heads + head;
        less[half] = r < count ? in.lse[at] * LOG2_E : 0.0f;
        delta[half] = r < count ? in.delta[at] : 0.0f;
    }
    UNROLL for (uint i = 0; i < D / 2; ++i) sums[i] = 0.0f;
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
            float ds[PART / 2], dp[PART / 2];
            products<D, PART / 16>(s.queries, row, s.keys, from, groups, lane, ds);
            products<D, PART / 16>(s.douts, row, s.values, from, groups, lane, dp);
            UNROLL for (uint e = 0; e < PART / 2; ++e) {
                const uint half = e / 2 % 2;
                ds[e] = exp2_(ds[e] * scale - less[half]) * (dp[e] - delta[half]);
            }
            if (!groups.all) {
                const Mask mask = mask_of(seen, w, step.own, step.at + part, lane);
                UNROLL for (uint e = 0; e < PART / 2; ++e) ds[e] = sees(mask, e) ? ds[e] : 0.0f;
            }
            accumulate<D, PART / 16>(ds, s.keys, from, groups, lane, sums);
        }
    }
    const float factors[2] = {p.scale, p.scale};
    const Target<Element> target = {dq + ((index_t)first * p.dq_width + column), p.dq_width, count, p.head_dim};
    store_rows<D>(target, sums, factors, lane);
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

// PART queries: where the first lies in the tiles of queries and in `columns`, its row, and how many are there.
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

// Adds their share to the gradients of a warp's 16 keys, which are from `row` on in the tile and from `key` on in all.
template <uint D>
INLINE void add_queries(Inputs in, KeyShared s, Part part, uint row, uint key, Groups groups, float scale, uint lane,
                        LOCAL(float) dk, LOCAL(float) dv) {
    float w[PART / 2], dp[PART / 2];
    uint bits = 0;
    if (!groups.all) bits = seen_bits(in.visible, part, key + lane / 4, lane);
    products<D, PART / 16>(s.keys, row, s.queries, part.place, groups, lane, w);
    UNROLL for (uint e = 0; e < PART / 2; ++e) {
        const uint query = e / 4 * 8 + lane % 4 * 2 + e % 2;
        w[e] = exp2_(w[e] * scale - s.columns[part.column + query]);
    }
    if (!groups.all)
        UNROLL for (uint e = 0; e < PART / 2; ++e) w[e] = bits >> e & 1 ? w[e] : 0.0f;
    accumulate<D, PART / 16>(w, s.douts, part.place, groups, lane, dv);
    products<D, PART / 16>(s.values, row, s.douts, part.place, groups, lane, dp);
    UNROLL for (uint e = 0; e < PART / 2; ++e) {
        const uint query = e / 4 * 8 + lane % 4 * 2 + e % 2;
        w[e] *= dp[e] - s.columns[part.column + Stage<D>::rows + query];
    }
    accumulate<D, PART / 16>(w, s.queries, part.place, groups, lane, dk);
}

template <uint D>
INLINE void key_gradients(Inputs in, GLOBAL(const uint) item, GLOBAL(Element) dkv, GLOBAL(float) partials,
                          GIVEN(AttentionParameters) p, KeyShared s, uint kv_head, uint thread) {
    const uint lane = thread % 32, row = thread / 32 * 16, rows = Stage<D>::rows;
    const uint key = item[0], all = item[1] - key, count = all > row ? smaller(16, all - row) : 0;
    const uint end = item[3], first_head = kv_head * (p.heads / p.kv_heads), to_values = p.kv_heads * p.head_dim;
    const bool causal = item[4] != 2;
    float dk[D / 2], dv[D / 2];
    UNROLL for (uint i = 0; i < D / 2; ++i) dk[i] = dv[i] = 0.0f;
    Turn turn = {first_head, item[2]};
    if (turn.first < end) {
        const uint width = causal ? p.kv_width : p.prefix_width;
        const uint column = (causal ? p.kv_column : p.prefix_column) + kv_head * p.head_dim;
        GLOBAL(const Element) keys = (causal ? in.kv : in.prefix) + ((index_t)key * width + column);
        copy_rows<D, ROWS>(s.keys, keys, width, p.head_dim, all, thread);
        copy_rows<D, ROWS>(s.values, keys + to_values, width, p.head_dim, all, thread);
        copy_turn<D>(in, p, s, turn, count_of<D>(turn, end), 0, thread);
        if (thread < 2 * rows) s.columns[thread] = column_of<D>(in, p, turn, count_of<D>(turn, end), thread);
    }
    cp_async_commit();
    for (uint stage = 0; turn.first < end; stage = 1 - stage) {
        Turn next = {turn.head + 1, turn.first};
        if (next.head == first_head + p.heads / p.kv_heads) {
            next.head = first_head;
            next.first += rows;
        }
        const bool more = next.first < end;
        float next_column = 0.0f;
        cp_async_wait(0);
        BARRIER(); // This turn's rows are there, and nobody needs the last turn's.
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
                add_queries<D>(in, s, part, row, key + row, groups, p.scale * LOG2_E, lane, dk, dv);
        }
        if (more && thread < 2 * rows) s.columns[(1 - stage) * 2 * rows + thread] = next_column;
        turn = next;
    }
    const float scale[2] = {p.scale, p.scale}, one[2] = {1.0f, 1.0f};
    const uint column = kv_head * p.head_dim;
    if (item[4] == 0) {
        GLOBAL(Element) to = dkv + ((index_t)(key + row) * p.dkv_width + p.dkv_column + column);
        const Target<Element> of_keys = {to, p.dkv_width, count, p.head_dim};
        const Target<Element> of_values = {to + to_values, p.dkv_width, count, p.head_dim};
        store_rows<D>(of_keys, dk, scale, lane);
        store_rows<D>(of_values, dv, one, lane);
    } else {
        GLOBAL(float) to = partials + (((index_t)item[5] * ROWS + row) * (2 * to_values) + column);
        const Target<float> of_keys = {to, 2 * to_values, count, p.head_dim};
        const Target<float> of_values = {to + to_values, 2 * to_values, count, p.head_dim};
        store_rows<D>(of_keys, dk, scale, lane);
        store_rows<D>(of_values, dv, one, lane);
    }
}

// Grid: tiles, query heads. Shared memory: 3 tiles of 64 rows.
#define FORWARD(D, BLOCKS) \
    KERNEL_FITTING(attention_mma_forward_##D, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, tiles), OUT(5, Element, out), OUT(6, float, lse), \
           PARAMETERS(7, AttentionParameters, p)) { \
        DYNAMIC_SHARED(Element, memory); \
        const Inputs in = {q, kv, prefix, visible, q, lse, lse}; \
        forward<D>(in, tiles + 6 * (index_t)BLOCK_X, out, lse, p, memory, BLOCK_Y, THREAD); \
    }

// Grid: tiles, query heads. Shared memory: 2 tiles of 64 rows, 4 of keys and values.
#define QUERY_GRADIENTS(D, BLOCKS) \
    KERNEL_FITTING(attention_mma_dq_##D, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, tiles), IN(5, Element, dout), IN(6, float, lse), IN(7, float, delta), \
           OUT(8, Element, dq), PARAMETERS(9, AttentionParameters, p)) { \
        DYNAMIC_SHARED(Element, memory); \
        const Inputs in = {q, kv, prefix, visible, dout, lse, delta}; \
        const QueryShared s = {memory, memory + ROWS * D, memory + 2 * ROWS * D, \
                               memory + 2 * ROWS * D + 2 * Stage<D>::rows * D}; \
        query_gradients<D>(in, tiles + 6 * (index_t)BLOCK_X, dq, p, s, BLOCK_Y, THREAD); \
    }

// Grid: items of keys, key heads. Shared memory: 2 tiles of 64 rows, 4 of queries, and 4 floats for each query.
#define KEY_GRADIENTS(D, BLOCKS) \
    KERNEL_FITTING(attention_mma_dkv_##D, BLOCK, BLOCKS, IN(0, Element, q), IN(1, Element, kv), IN(2, Element, prefix), \
           IN(3, uint, visible), IN(4, uint, key_items), IN(5, Element, dout), IN(6, float, lse), \
           IN(7, float, delta), OUT(8, Element, dkv), OUT(9, float, partials), \
           PARAMETERS(10, AttentionParameters, p)) { \
        DYNAMIC_SHARED(Element, memory); \
        DYNAMIC_SHARED(float, floats); \
        const uint queries = Stage<D>::rows * D; \
        const Inputs in = {q, kv, prefix, visible, dout, lse, delta}; \
        const KeyShared s = {memory, memory + ROWS * D, memory + 2 * ROWS * D, memory + 2 * ROWS * D + 2 * queries, \
                             floats + (ROWS * D + 2 * queries)}; \
        key_gradients<D>(in, key_items + 6 * (index_t)BLOCK_X, dkv, partials, p, s, BLOCK_Y, THREAD); \
    }

FORWARD(64, 4)
FORWARD(128, 2)
QUERY_GRADIENTS(64, 3)
QUERY_GRADIENTS(128, 3)
KEY_GRADIENTS(64, 3)
KEY_GRADIENTS(128, 2)

#endif
