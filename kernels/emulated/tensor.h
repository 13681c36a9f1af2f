// The words of CUDA's files alone: asynchronous copies, and tiles of 16-bit elements for the tensor cores.
// Included by emulated.h, at its end.
#pragma once

INLINE uint load_pair(GROUP(const Element) p, index_t at) {
    uint64_t offset;
    emulated::Region *region = p.aligned("load_pair", at, offset, 4);
    region->reads(offset / 4, 4);
    uint both;
    memcpy(&both, region->base + offset, 4);
    return both;
}
INLINE void store_pair(GROUP(Element) p, index_t at, uint both) {
    uint64_t offset;
    emulated::Region *region = p.aligned("store_pair", at, offset, 4);
    region->writes(offset / 4, 4);
    memcpy(region->base + offset, &both, 4);
}

INLINE void cp_async16(GROUP(Element) to, GLOBAL(const Element) from, bool valid) {
    emulated::Machine &machine = *emulated::Machine::current();
    uint64_t offset, source;
    emulated::Region *region = to.aligned("cp_async16 to", 0, offset, 16);
    const emulated::Region *origin = from.aligned("cp_async16 from", 0, source, 16);
    if (!region->shared || origin->shared) machine.fail("cp_async16 goes from global memory to shared");
    emulated::Copy copy = {region, offset, {}};
    if (valid)
        for (uint i = 0; i < 8; ++i) {
            const Element e = from[i];
            memcpy(copy.bytes + 2 * i, &e, 2);
        }
    for (uint i = 0; i < 8; ++i) region->writes(offset / 2 + i, 2, emulated::IN_FLIGHT);
    machine.running->uncommitted.push_back(copy);
}
INLINE void cp_async_commit() {
    emulated::Fiber &fiber = *emulated::Machine::current()->running;
    fiber.groups.push_back(std::move(fiber.uncommitted));
    fiber.uncommitted.clear();
}
INLINE void cp_async_wait(uint newest) {
    emulated::Fiber &fiber = *emulated::Machine::current()->running;
    for (; fiber.groups.size() > newest; fiber.groups.pop_front())
        for (const emulated::Copy &copy : fiber.groups.front()) copy.to->lands(copy.offset, copy.bytes);
}

// Lane 8 i + j gives row j of matrix i.
INLINE const unsigned char (*matrix_rows(GROUP(const Element) row, const char *what, const char *file, uint line))[32] {
    Element elements[8];
    uint64_t offset;
    emulated::Machine &machine = *emulated::Machine::current();
    if (!row.aligned(what, 0, offset, 16)->shared) machine.fail(std::string(what) + " reads shared memory");
    for (uint i = 0; i < 8; ++i) elements[i] = row[i];
    return machine.exchange(elements, sizeof elements, {what, file, line, 0, false});
}
INLINE uint matrix_element(const unsigned char (*slots)[32], uint row, uint column) {
    uint16_t raw;
    memcpy(&raw, slots[row] + 2 * column, 2);
    return raw;
}
// Register i of a lane: row lane / 4 of matrix i, columns 2 (lane % 4) and the next.
INLINE void ldmatrix4(LOCAL(uint) r, GROUP(const Element) row, EMULATED_FROM) {
    const auto slots = matrix_rows(row, "ldmatrix4", file, line);
    const uint lane = own_lane();
    for (uint i = 0; i < 4; ++i) {
        const uint of = 8 * i + lane / 4, column = 2 * (lane % 4);
        r[i] = matrix_element(slots, of, column) | matrix_element(slots, of, column + 1) << 16;
    }
}
// Register i of a lane: column lane / 4 of matrix i, rows 2 (lane % 4) and the next.
INLINE void ldmatrix4_transposed(LOCAL(uint) r, GROUP(const Element) row, EMULATED_FROM) {
    const auto slots = matrix_rows(row, "ldmatrix4_transposed", file, line);
    const uint lane = own_lane();
    for (uint i = 0; i < 4; ++i) {
        const uint of = 8 * i + 2 * (lane % 4), column = lane / 4;
        r[i] = matrix_element(slots, of, column) | matrix_element(slots, of + 1, column) << 16;
    }
}

// With g = lane / 4 and t = lane % 4, pairs of columns (of a, d) or rows (of b) from 2 t:
// a[0]: row g, columns 2 t; a[1]: row g + 8; a[2]: row g, columns 2 t + 8; a[3]: row g + 8, columns 2 t + 8
// b[0]: column g, rows 2 t; b[1]: rows 2 t + 8       d[0..2]: row g, columns 2 t; d[2..4]: row g + 8
INLINE void mma_16x8x16(LOCAL(float) d, LOCAL(const uint) a, LOCAL(const uint) b, EMULATED_FROM) {
    uint mine[6];
    memcpy(mine, a, 16);
    memcpy(mine + 4, b, 8);
    const auto slots = emulated::Machine::current()->exchange(mine, sizeof mine, {"mma_16x8x16", file, line, 0, false});
    const uint g = own_lane() / 4, t = own_lane() % 4;
    for (uint quad = 0; quad < 4; ++quad) {
        uint left[2][4], right[2][4][2];
        memcpy(left[0], slots[4 * g + quad], 16);
        for (uint n = 0; n < 2; ++n) memcpy(right[n][quad], slots[4 * (2 * t + n) + quad] + 16, 8);
        for (uint half = 0; half < 2; ++half)
            for (uint row = 0; row < 2; ++row)
                for (uint n = 0; n < 2; ++n) {
                    float x[2], y[2];
                    unpack2(left[0][2 * half + row], x);
                    unpack2(right[n][quad][half], y);
                    d[2 * row + n] += x[0] * y[0] + x[1] * y[1];
                }
    }
}
