// bf16 and f16 as they are stored, and their conversion to and from float.
#pragma once
#include <cstdint>
#include <cstring>

namespace emulated __attribute__((visibility("hidden"))) {

template <typename To, typename From>
To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "the same bits");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Storage formats of 16 bits; to nearest, ties to even.
struct bf16 {
    uint16_t raw;
    bf16() = default;
    explicit bf16(float f) {
        const uint32_t u = bits<uint32_t>(f);
        raw = f != f ? (u >> 16) | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;
    }
    explicit operator float() const { return bits<float>(uint32_t(raw) << 16); }
};
struct f16 {
    uint16_t raw;
    f16() = default;
    explicit f16(float f) {
        const uint32_t u = bits<uint32_t>(f), sign = u >> 16 & 0x8000, size = u & 0x7fffffff;
        if (size > 0x7f800000) raw = sign | 0x7e00;
        else if (size >= 0x477ff000) raw = sign | 0x7c00; // 65520 and more round to infinity
        else if (size < 0x38800000) // under 2^-14: steps of 2^-24; the sum rounds, as 0.5 has steps of 2^-24
            raw = sign | (bits<uint32_t>(bits<float>(size) + 0.5f) - bits<uint32_t>(0.5f));
        else raw = sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13);
    }
    explicit operator float() const {
        const uint32_t sign = uint32_t(raw & 0x8000) << 16, size = raw & 0x7fff;
        if (size >= 0x7c00) return bits<float>(sign | 0x7f800000 | (size & 0x3ff) << 13);
        if (size < 0x400) return bits<float>(sign | bits<uint32_t>(float(size) * 0x1p-24f));
        return bits<float>(sign | ((size << 13) + 0x38000000));
    }
};

} // namespace emulated
