// The dialect of README.md for the host's compiler (C++17, GCC or clang): a machine that runs threads as fibers and
// holds every access to memory against its bounds and against the other threads'. For tests:
// `c++ -std=c++17 -O1 -fPIC -shared -include kernels/emulated.h -DELEMENT_BF16 -x c++ kernels/*.cu
// kernels/emulated/emulate.cpp -o kernels.so`.
//
// What it finds: accesses out of bounds, shared memory read before it is written, races (also between blocks), barriers
// and warp functions that not all threads come to, addresses that are not aligned, copies that are not waited for,
// buffers that overlap, more shared memory than there is. What it cannot find: an index out of a thread's own array.
#pragma once
#include <cmath>
#include <stdint.h>

typedef unsigned int uint;
typedef unsigned long long index_t;

#include "emulated/half.h"
#include "emulated/launch.h"

#define INLINE static inline
#define UNROLL
#define GLOBAL(T) emulated::Checked<T>
#define GROUP(T) emulated::Checked<T>
#define LOCAL(T) T *
#define IN(i, T, name) emulated::Checked<const T> name
#define OUT(i, T, name) emulated::Checked<T> name
#define PARAMETERS(i, S, name) const S &name
#define GIVEN(S) const S &
#define KERNEL(name, max_threads, ...) \
    static void name(const emulated::Place &here, __VA_ARGS__); \
    static const bool enlisted_##name = emulated::enlist(#name, __FILE__, max_threads, #__VA_ARGS__, name); \
    static void name([[maybe_unused]] const emulated::Place &here, __VA_ARGS__)
// Not by KERNEL: it wants the arguments' text as it stands in the source.
#define KERNEL_FITTING(name, max_threads, blocks, ...) \
    static void name(const emulated::Place &here, __VA_ARGS__); \
    static const bool enlisted_##name = emulated::enlist(#name, __FILE__, max_threads, #__VA_ARGS__, name); \
    static void name([[maybe_unused]] const emulated::Place &here, __VA_ARGS__)
#define SHARED(T, name, count) \
    static char place_of_##name; \
    const emulated::Checked<T> name = emulated::shared_memory<T>(&place_of_##name, #name, count)
#define DYNAMIC_SHARED(T, name) const emulated::Checked<T> name = emulated::dynamic_memory<T>(#name)
#define THREAD (here.thread)
#define THREADS (here.threads)
#define LANE (here.thread % 32)
#define WARP (here.thread / 32)
#define BLOCK_X (here.block[0])
#define BLOCK_Y (here.block[1])
#define BLOCK_Z (here.block[2])
#define BARRIER() emulated::Machine::current()->meet({"BARRIER", __FILE__, __LINE__, 0, true})
#define WARP_BARRIER() emulated::Machine::current()->meet({"WARP_BARRIER", __FILE__, __LINE__, 0, false})
#define NEGATIVE_INFINITY (-INFINITY)
// Where a warp function is called: the caller's file and line.
#define EMULATED_FROM const char *file = __builtin_FILE(), uint line = __builtin_LINE()

#if defined(ELEMENT_BF16)
typedef emulated::bf16 Element;
#elif defined(ELEMENT_F16)
typedef emulated::f16 Element;
#elif defined(ELEMENT_F32)
typedef float Element;
#else
#error "define ELEMENT_F32, ELEMENT_BF16 or ELEMENT_F16"
#endif
INLINE float wide(float f) { return f; }
#if !defined(ELEMENT_F32)
INLINE float wide(Element e) { return float(e); }
INLINE uint pack2(float low, float high) { return Element(low).raw | uint(Element(high).raw) << 16; }
INLINE void unpack2(uint both, LOCAL(float) out) {
    out[0] = float(emulated::bits<Element>(uint16_t(both)));
    out[1] = float(emulated::bits<Element>(uint16_t(both >> 16)));
}
#endif
INLINE Element narrow(float f) { return Element(f); }

INLINE float exp_(float x) { return std::exp(x); }
INLINE float reciprocal_(float x) { return 1.0f / x; }
INLINE float log_(float x) { return std::log(x); }
INLINE float sqrt_(float x) { return std::sqrt(x); }
INLINE float rsqrt_(float x) { return 1.0f / std::sqrt(x); }
INLINE float max_(float a, float b) { return std::fmax(a, b); }
INLINE float min_(float a, float b) { return std::fmin(a, b); }

// All lanes' values; to be read before the lane's next warp function.
INLINE const unsigned char (*warp_values(float x, const char *what, uint detail, const char *file, uint line))[32] {
    return emulated::Machine::current()->exchange(&x, sizeof x, {what, file, line, detail, false});
}
INLINE float lane_value(const unsigned char (*slots)[32], uint lane) {
    float x;
    memcpy(&x, slots[lane], sizeof x);
    return x;
}
INLINE uint own_lane() { return emulated::Machine::current()->running->place.thread % 32; }
INLINE float shuffle_xor(float x, uint mask, EMULATED_FROM) {
    const auto slots = warp_values(x, "shuffle_xor", mask, file, line);
    return lane_value(slots, (own_lane() ^ mask) % 32);
}
// The butterfly's order of additions: lane l adds lane l ^ mask, for masks of 16, 8, 4, 2, 1.
template <typename F>
INLINE float butterfly(const unsigned char (*slots)[32], F f) {
    float now[32], next[32];
    for (uint lane = 0; lane < 32; ++lane) now[lane] = lane_value(slots, lane);
    for (uint mask = 16; mask; mask /= 2) {
        for (uint lane = 0; lane < 32; ++lane) next[lane] = f(now[lane], now[lane ^ mask]);
        memcpy(now, next, sizeof now);
    }
    return now[own_lane()];
}
INLINE float warp_sum(float x, EMULATED_FROM) {
    return butterfly(warp_values(x, "warp_sum", 0, file, line), [](float a, float b) { return a + b; });
}
INLINE float warp_max(float x, EMULATED_FROM) {
    return butterfly(warp_values(x, "warp_max", 0, file, line), [](float a, float b) { return std::fmax(a, b); });
}
INLINE float block_sum(float x, GROUP(float) scratch, uint thread, uint threads, EMULATED_FROM) {
    x = warp_sum(x, file, line);
    if (threads == 32) return x;
    if (thread % 32 == 0) scratch[thread / 32] = x;
    BARRIER();
    x = warp_sum(thread % 32 < threads / 32 ? scratch[thread % 32] : 0.0f, file, line);
    BARRIER();
    return x;
}

template <typename T>
INLINE void load8(emulated::Checked<const T> p, index_t at, uint count, bool aligned, LOCAL(float) out) {
    uint64_t offset;
    if (aligned && count >= 8) p.aligned("load8", at, offset, 16);
    for (uint i = 0; i < 8; ++i) out[i] = i < count ? wide(p[at + i]) : 0.0f;
}
template <typename T>
INLINE void store8(emulated::Checked<T> p, index_t at, uint count, bool aligned, const float *values) {
    uint64_t offset;
    if (aligned && count >= 8) p.aligned("store8", at, offset, 16);
    for (uint i = 0; i < 8 && i < count; ++i) p[at + i] = T(values[i]);
}

#if !defined(ELEMENT_F32)
#include "emulated/tensor.h"
#endif
// What the kernels' files hold is no more visible than what it is made of.
#pragma GCC visibility push(hidden)
