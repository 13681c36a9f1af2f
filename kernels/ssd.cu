// The scan of a Mamba2 layer (src/ops/ssd/mod.rs), as the recurrence, row by row:
//
//   dt = clamp(softplus(r + dt_bias))      S_t = exp(a dt_t) S_{t-1} + dt_t x_t B_t^T      y_t = S_t C_t + d x_t
//
// Backward, with dS_t the gradient of S_t, which is that of the end state after the last row:
//
//   dS_t = exp(a dt_{t+1}) dS_{t+1} + dy_t C_t^T      b_t = dS_t B_t      dx_t = d dy_t + dt_t b_t
//   dC_t = sum over heads of S_t^T dy_t               dB_t = sum over heads of dt_t dS_t^T x_t
//   da_t = da_{t+1} + C_t . (S_t^T dy_t) - dt_t x_t . b_t, from <dS, S> of the end      ddt_t = x_t . b_t + a da_t
//
// A unit is a head, or PART values of one. A thread holds one column of a unit's state in registers: index n of N. An item is a
// list of segments that start from one state; the items of a level are independent, and each level is a launch. The steps before
// the softplus, all states and their gradients are float.

// Values of a unit at most.
#define PART 32
// Rows whose values are in shared memory at a time.
#define TILE 8
// Most warps of a block.
#define WARPS 8

#define NONE 0xffffffffu
// An item has 4 numbers: its first segment and their number; its start; where the gradient of that goes, or NONE. A segment has 4:
// its first row and the row after its last; where its end state goes, or NONE; where the gradient of that is, or NONE.
// Start of an item: NONE, a given state, or else a state of the memory. Term of a sum: a row of the gradients of the ends, or else
// of those of the items' starts.
#define OTHER (1u << 31)

struct SsdParameters {
    uint rows, heads, head_dim, state, groups;
    // Columns of x, B and C, and of x alone; units of a head; slices of a group of heads, and units of a slice.
    uint width, inner, parts, slices, slice_units;
    // Of the level.
    uint first_item;
    // Whether y is written.
    uint output;
    float low, high;
};

// ln(1 + e^x), x itself above 20.
INLINE float softplus(float x) {
    if (x > 20.0f) return x;
    const float e = exp_(x);
    return e < 0.03125f ? e * (1.0f - e * (0.5f - e * (0.33333334f - e * 0.25f))) : log_(1.0f + e);
}

// The values of a unit.
struct Unit {
    uint head, group, first, count;
};
INLINE Unit unit_of(uint index, GIVEN(SsdParameters) p) {
    Unit unit;
    unit.head = index / p.parts;
    unit.group = unit.head / (p.heads / p.groups);
    const uint part = index % p.parts * PART;
    unit.first = unit.head * p.head_dim + part;
    unit.count = p.head_dim - part < PART ? p.head_dim - part : PART;
    return unit;
}

// A thread of a block: `column` is its index n.
struct Worker {
    uint index, count, lane, warp;
};

// Up to TILE rows: where they are, and how many.
struct Tile {
    uint first, rows;
};

// Shared memory of a tile.
struct Staged {
    GROUP(float) x;
    GROUP(float) dy;
    GROUP(float) dt;
    GROUP(float) decay;
};

// Matrices that the rows are read from.
struct Inputs {
    GLOBAL(const Element) xbc;
    GLOBAL(const float) r;
    GLOBAL(const float) a;
    GLOBAL(const float) dt_bias;
};

INLINE void stage_steps(Inputs in, Unit unit, Tile tile, GIVEN(SsdParameters) p, Worker worker, Staged to) {
    if (worker.index < TILE) {
        float dt = 0.0f;
        if (worker.index < tile.rows) {
            dt = softplus(in.r[index_t(tile.first + worker.index) * p.heads + unit.head] + in.dt_bias[unit.head]);
            dt = min_(max_(dt, p.low), p.high);
        }
        to.dt[worker.index] = dt;
        to.decay[worker.index] = exp_(in.a[unit.head] * dt);
    }
}

// The unit's columns of a matrix with rows of `stride`; zeros beyond rows and values.
INLINE void stage_values(GLOBAL(const Element) from, uint stride, Unit unit, Tile tile, Worker worker, GROUP(float) to) {
    for (uint i = worker.index; i < TILE * PART; i += worker.count) {
        const uint row = i / PART, value = i % PART;
        const bool inside = row < tile.rows && value < unit.count;
        to[i] = inside ? wide(from[index_t(tile.first + row) * stride + unit.first + value]) : 0.0f;
    }
}

// B and C of the thread's column.
INLINE void load_sides(GLOBAL(const Element) xbc, Unit unit, Tile tile, uint column, GIVEN(SsdParameters) p,
                       LOCAL(float) b, LOCAL(float) c) {
    UNROLL for (uint j = 0; j < TILE; ++j) {
        b[j] = c[j] = 0.0f;
        if (j < tile.rows && column < p.state) {
            const index_t at = index_t(tile.first + j) * p.width + p.inner + unit.group * p.state + column;
            b[j] = wide(xbc[at]);
            c[j] = wide(xbc[at + p.groups * p.state]);
        }
    }
}

INLINE void load_state(GLOBAL(const float) states, uint index, Unit unit, uint column, GIVEN(SsdParameters) p,
                       LOCAL(float) s) {
    UNROLL for (uint i = 0; i < PART; ++i) {
        s[i] = 0.0f;
        if (i < unit.count && column < p.state)
            s[i] = states[(index_t(index) * p.inner + unit.first + i) * p.state + column];
    }
}
INLINE void load_start(GLOBAL(const float) given, GLOBAL(const float) memory, uint start, Unit unit, uint column,
                       GIVEN(SsdParameters) p, LOCAL(float) s) {
    if (start == NONE) {
        UNROLL for (uint i = 0; i < PART; ++i) s[i] = 0.0f;
    } else if (start & OTHER) {
        load_state(given, start & ~OTHER, unit, column, p, s);
    } else {
        load_state(memory, start, unit, column, p, s);
    }
}
INLINE void store_state(GLOBAL(float) states, uint index, Unit unit, uint column, GIVEN(SsdParameters) p,
                        LOCAL(const float) s) {
    UNROLL for (uint i = 0; i < PART; ++i)
        if (i < unit.count && column < p.state)
            states[(index_t(index) * p.inner + unit.first + i) * p.state + column] = s[i];
}

// Halves the number of values: a lane keeps those of its half, and adds its partner's.
template <uint mask>
INLINE void halve(LOCAL(float) v, uint lane) {
    const bool upper = (lane & mask) != 0;
    UNROLL for (uint i = 0; i < mask; ++i) {
        const float kept = upper ? v[i + mask] : v[i], sent = upper ? v[i] : v[i + mask];
        v[i] = kept + shuffle_xor(sent, mask);
    }
}
// Sums each of 32 values over the lanes of a warp: lane i gets the sum of value i.
INLINE float sum_values(LOCAL(float) v, uint lane) {
    halve<16>(v, lane);
    halve<8>(v, lane);
    halve<4>(v, lane);
    halve<2>(v, lane);
    halve<1>(v, lane);
    return v[0];
}

// The sum over the warps of a row's value.
INLINE float sum_warps(GROUP(const float) sums, uint row, uint value, uint warps) {
    float sum = 0.0f;
    for (uint warp = 0; warp < warps; ++warp) sum += sums[(row * WARPS + warp) * PART + value];
    return sum;
}

// grid: (items of the level, units, 1), threads: state rounded up to a multiple of 32
KERNEL_FITTING(ssd_forward, 256, 1, IN(0, Element, xbc), IN(1, float, r), IN(2, float, a), IN(3, float, d), IN(4, float, dt_bias),
       IN(5, float, given), IN(6, uint, items), IN(7, uint, segments), OUT(8, float, memory), OUT(9, Element, y),
       PARAMETERS(10, SsdParameters, p)) {
    SHARED(float, x, TILE * PART);
    SHARED(float, dt, TILE);
    SHARED(float, decay, TILE);
    SHARED(float, sums, TILE * WARPS * PART);
    const Unit unit = unit_of(BLOCK_Y, p);
    const Worker worker = {THREAD, THREADS, LANE, WARP};
    const Inputs in = {xbc, r, a, dt_bias};
    const Staged staged = {x, x, dt, decay};
    const uint item = (p.first_item + BLOCK_X) * 4, segments_end = items[item] + items[item + 1];
    for (uint segment = items[item]; segment < segments_end; ++segment) {
        const uint rows_end = segments[segment * 4 + 1], slot = segments[segment * 4 + 2];
        float s[PART];
        load_start(given, memory, items[item + 2], unit, THREAD, p, s);
        for (uint first = segments[segment * 4]; first < rows_end; first += TILE) {
            const Tile tile = {first, rows_end - first < TILE ? rows_end - first : TILE};
            float b[TILE], c[TILE];
            BARRIER();
            stage_values(xbc, p.width, unit, tile, worker, x);
            stage_steps(in, unit, tile, p, worker, staged);
            load_sides(xbc, unit, tile, THREAD, p, b, c);
            BARRIER();
            UNROLL for (uint j = 0; j < TILE; ++j) {
                if (j >= tile.rows) break;
                float terms[PART];
                UNROLL for (uint i = 0; i < PART; ++i) {
                    s[i] = decay[j] * s[i] + dt[j] * x[j * PART + i] * b[j];
                    terms[i] = s[i] * c[j];
                }
                if (p.output) sums[(j * WARPS + WARP) * PART + LANE] = sum_values(terms, LANE);
            }
            if (!p.output) continue;
            BARRIER();
            for (uint i = THREAD; i < tile.rows * PART; i += THREADS) {
                const uint row = i / PART, value = i % PART;
                if (value >= unit.count) continue;
                const float sum = sum_warps(sums, row, value, THREADS / 32) + d[unit.head] * x[i];
                y[index_t(first + row) * p.inner + unit.first + value] = narrow(sum);
            }
        }
        if (slot != NONE) store_state(memory, slot, unit, THREAD, p, s);
    }
}

// Adds `value` to an element, or writes it if it is the first.
INLINE void accumulate(GLOBAL(float) sum, index_t at, float value, bool first) { sum[at] = first ? value : sum[at] + value; }

// Gradients of x; of each row and unit C . (S^T dy) - dt x . b and x . b (`dots`); of each slice those of B and C (`sides`, [slices,
// rows, 2 state]); and of each item that of its start.
// grid: (items of the level, slices * groups, 1), threads: as ssd_forward
KERNEL_FITTING(ssd_backward, 256, 1, IN(0, Element, dy), IN(1, Element, xbc), IN(2, float, r), IN(3, float, a), IN(4, float, d),
       IN(5, float, dt_bias), IN(6, float, given), IN(7, float, memory), IN(8, float, dends), IN(9, uint, items),
       IN(10, uint, segments), OUT(11, Element, dxbc), OUT(12, float, starts), OUT(13, float, sides), OUT(14, float, dots),
       PARAMETERS(15, SsdParameters, p)) {
    SHARED(float, x, TILE * PART);
    SHARED(float, dyt, TILE * PART);
    SHARED(float, dt, TILE);
    SHARED(float, decay, TILE);
    SHARED(float, sums, TILE * WARPS * PART);
    SHARED(float, scratch, 32);
    const Worker worker = {THREAD, THREADS, LANE, WARP};
    const Inputs in = {xbc, r, a, dt_bias};
    const Staged staged = {x, dyt, dt, decay};
    const uint item = (p.first_item + BLOCK_X) * 4, segments_end = items[item] + items[item + 1];
    const uint group_units = p.heads / p.groups * p.parts, in_group = BLOCK_Y % p.slices * p.slice_units;
    const uint first_unit = BLOCK_Y / p.slices * group_units + in_group;
    const uint units = group_units - in_group < p.slice_units ? group_units - in_group : p.slice_units;
    for (uint u = 0; u < units; ++u) {
        const Unit unit = unit_of(first_unit + u, p);
        float start[PART];
        UNROLL for (uint i = 0; i < PART; ++i) start[i] = 0.0f;
        for (uint segment = items[item]; segment < segments_end; ++segment) {
            const uint rows_first = segments[segment * 4], rows_end = segments[segment * 4 + 1];
            const uint end = segments[segment * 4 + 3];
            float s[PART];
            load_start(given, memory, items[item + 2], unit, THREAD, p, s);
            for (uint first = rows_first; first < rows_end; first += TILE) {
                const Tile tile = {first, rows_end - first < TILE ? rows_end - first : TILE};
                float b[TILE], c[TILE];
                BARRIER();
                stage_values(xbc, p.width, unit, tile, worker, x);
                stage_values(dy, p.inner, unit, tile, worker, dyt);
                stage_steps(in, unit, tile, p, worker, staged);
                load_sides(xbc, unit, tile, THREAD, p, b, c);
                BARRIER();
                UNROLL for (uint j = 0; j < TILE; ++j) {
                    if (j >= tile.rows) break;
                    float dc = 0.0f;
                    UNROLL for (uint i = 0; i < PART; ++i) {
                        s[i] = decay[j] * s[i] + dt[j] * x[j * PART + i] * b[j];
                        dc += s[i] * dyt[j * PART + i];
                    }
                    const index_t at = ((index_t(BLOCK_Y) * p.rows + first + j) * 2 + 1) * p.state + THREAD;
                    if (THREAD < p.state) accumulate(sides, at, dc, u == 0);
                    const float off = warp_sum(dc * c[j]);
                    if (LANE == 0) sums[j * WARPS + WARP] = off;
                }
                BARRIER();
                if (THREAD < tile.rows) {
                    float off = 0.0f;
                    for (uint warp = 0; warp < THREADS / 32; ++warp) off += sums[THREAD * WARPS + warp];
                    dots[(index_t(first + THREAD) * p.heads * p.parts + first_unit + u) * 2] = off;
                }
            }
            float ds[PART], carry = 0.0f;
            UNROLL for (uint i = 0; i < PART; ++i) ds[i] = 0.0f;
            if (end != NONE) {
                load_state(dends, end, unit, THREAD, p, ds);
                UNROLL for (uint i = 0; i < PART; ++i) carry += ds[i] * s[i];
                BARRIER();
                carry = block_sum(carry, scratch, THREAD, THREADS);
                if (THREAD == 0) dots[(index_t(rows_end - 1) * p.heads * p.parts + first_unit + u) * 2] += carry;
            }
            for (uint left = rows_end - rows_first; left > 0;) {
                const uint count = left % TILE == 0 ? TILE : left % TILE;
                left -= count;
                const Tile tile = {rows_first + left, count};
                float b[TILE], c[TILE];
                BARRIER();
                stage_values(xbc, p.width, unit, tile, worker, x);
                stage_values(dy, p.inner, unit, tile, worker, dyt);
                stage_steps(in, unit, tile, p, worker, staged);
                load_sides(xbc, unit, tile, THREAD, p, b, c);
                BARRIER();
                UNROLL for (uint back = 0; back < TILE; ++back) {
                    const uint j = TILE - 1 - back;
                    if (j >= tile.rows) continue;
                    float db = 0.0f, terms[PART];
                    UNROLL for (uint i = 0; i < PART; ++i) {
                        ds[i] += dyt[j * PART + i] * c[j];
                        db += ds[i] * x[j * PART + i];
                        terms[i] = ds[i] * b[j];
                        ds[i] *= decay[j];
                    }
                    const index_t at = (index_t(BLOCK_Y) * p.rows + tile.first + j) * 2 * p.state + THREAD;
                    if (THREAD < p.state) accumulate(sides, at, db * dt[j], u == 0);
                    sums[(j * WARPS + WARP) * PART + LANE] = sum_values(terms, LANE);
                }
                BARRIER();
                for (uint row = WARP; row < tile.rows; row += THREADS / 32) {
                    const float bt = sum_warps(sums, row, LANE, THREADS / 32);
                    const uint at = row * PART + LANE;
                    if (LANE < unit.count)
                        dxbc[index_t(tile.first + row) * p.width + unit.first + LANE] =
                            narrow(d[unit.head] * dyt[at] + dt[row] * bt);
                    const float xb = warp_sum(x[at] * bt);
                    if (LANE == 0) {
                        const index_t dot = (index_t(tile.first + row) * p.heads * p.parts + first_unit + u) * 2;
                        dots[dot] -= dt[row] * xb;
                        dots[dot + 1] = xb;
                    }
                }
            }
            UNROLL for (uint i = 0; i < PART; ++i) start[i] += ds[i];
        }
        if (items[item + 3] != NONE) store_state(starts, items[item + 3], unit, THREAD, p, start);
    }
}

// Sums the slices' gradients of B and C.
// grid: (rows, groups, 1), threads: as ssd_forward
KERNEL(ssd_backward_sides, 256, IN(0, float, sides), OUT(1, Element, dxbc), PARAMETERS(2, SsdParameters, p)) {
    if (THREAD >= p.state) return;
    float db = 0.0f, dc = 0.0f;
    for (uint slice = BLOCK_Y * p.slices; slice < (BLOCK_Y + 1) * p.slices; ++slice) {
        const index_t at = (index_t(slice) * p.rows + BLOCK_X) * 2 * p.state + THREAD;
        db += sides[at];
        dc += sides[at + p.state];
    }
    const index_t at = index_t(BLOCK_X) * p.width + p.inner + BLOCK_Y * p.state + THREAD;
    dxbc[at] = narrow(db);
    dxbc[at + p.groups * p.state] = narrow(dc);
}

// The gradient of r.
// grid: (segments, ceil(heads / 32), 1), threads: 32
KERNEL(ssd_backward_steps, 32, IN(0, float, dots), IN(1, float, r), IN(2, float, a), IN(3, float, dt_bias),
       IN(4, uint, segments), OUT(5, Element, dr), PARAMETERS(6, SsdParameters, p)) {
    const uint head = BLOCK_Y * 32 + THREAD, first = segments[BLOCK_X * 4];
    if (head >= p.heads) return;
    float da = 0.0f;
    for (uint row = segments[BLOCK_X * 4 + 1]; row-- > first;) {
        float ddt = 0.0f;
        for (uint part = 0; part < p.parts; ++part) {
            const index_t at = (index_t(row) * p.heads * p.parts + head * p.parts + part) * 2;
            da += dots[at];
            ddt += dots[at + 1];
        }
        ddt += a[head] * da;
        const float x = r[index_t(row) * p.heads + head] + dt_bias[head], dt = softplus(x);
        const bool clamped = dt <= p.low || dt >= p.high;
        dr[index_t(row) * p.heads + head] = narrow(clamped ? 0.0f : ddt * reciprocal_(1.0f + exp_(-x)));
    }
}

struct SsdSumParameters {
    uint first, state_len;
};

// Sums of states' gradients: terms[offsets[i]..offsets[i + 1]] of `starts` and `dends` each.
// grid: (sums from the first, ceil(state_len / threads), 1), threads: 256
KERNEL(ssd_sum_states, 256, IN(0, float, starts), IN(1, float, dends), IN(2, uint, offsets), IN(3, uint, terms),
       OUT(4, float, out), PARAMETERS(5, SsdSumParameters, p)) {
    const uint at = BLOCK_Y * THREADS + THREAD, to = p.first + BLOCK_X;
    if (at >= p.state_len) return;
    float sum = 0.0f;
    for (uint term = offsets[to]; term < offsets[to + 1]; ++term) {
        const uint code = terms[term];
        const index_t from = index_t(code & ~OTHER) * p.state_len + at;
        sum += code & OTHER ? dends[from] : starts[from];
    }
    out[index_t(to) * p.state_len + at] = sum;
}
