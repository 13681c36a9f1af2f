// The dialect of README.md for Metal (Apple silicon, macOS 14 and newer: bfloat needs Metal 3.1).
#include <metal_stdlib>
using namespace metal;

typedef ulong index_t;

#define INLINE static inline
#define UNROLL _Pragma("unroll")
#define GLOBAL(T) device T *
#define GROUP(T) threadgroup T *
#define LOCAL(T) thread T *
#define IN(i, T, name) device const T *name [[buffer(i)]]
#define OUT(i, T, name) device T *name [[buffer(i)]]
#define PARAMETERS(i, S, name) constant S &name [[buffer(i)]]
#define GIVEN(S) constant S &
#define KERNEL(name, max_threads, ...) \
    [[kernel, max_total_threads_per_threadgroup(max_threads)]] void name( \
        __VA_ARGS__, uint thread_index [[thread_index_in_threadgroup]], \
        uint3 block_index [[threadgroup_position_in_grid]], uint3 block_size [[threads_per_threadgroup]])
#define KERNEL_FITTING(name, max_threads, blocks, ...) KERNEL(name, max_threads, __VA_ARGS__)
#define SHARED(T, name, count) threadgroup T name[count]
#define THREAD (thread_index)
#define THREADS (block_size.x)
#define LANE (thread_index % 32)
#define WARP (thread_index / 32)
#define BLOCK_X (block_index.x)
#define BLOCK_Y (block_index.y)
#define BLOCK_Z (block_index.z)
#define BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device)
#define WARP_BARRIER() simdgroup_barrier(mem_flags::mem_threadgroup | mem_flags::mem_device)
#define NEGATIVE_INFINITY (-INFINITY)

#if defined(ELEMENT_BF16)
typedef bfloat Element;
typedef vec<bfloat, 4> Element4;
#elif defined(ELEMENT_F16)
typedef half Element;
typedef half4 Element4;
#elif defined(ELEMENT_F32)
typedef float Element;
#else
#error "define ELEMENT_F32, ELEMENT_BF16 or ELEMENT_F16"
#endif
INLINE float wide(Element e) { return float(e); }
#if !defined(ELEMENT_F32)
INLINE float wide(float f) { return f; }
#endif
INLINE Element narrow(float f) { return Element(f); }

INLINE float exp_(float x) { return exp(x); }
INLINE float reciprocal_(float x) { return 1.0f / x; }
INLINE float log_(float x) { return log(x); }
INLINE float sqrt_(float x) { return sqrt(x); }
INLINE float rsqrt_(float x) { return 1.0f / sqrt(x); }
INLINE float max_(float a, float b) { return max(a, b); }
INLINE float min_(float a, float b) { return min(a, b); }

INLINE float shuffle_xor(float x, uint mask) { return simd_shuffle_xor(x, ushort(mask)); }
INLINE float warp_sum(float x) {
    UNROLL for (uint mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
INLINE float warp_max(float x) {
    UNROLL for (uint mask = 16; mask; mask /= 2) x = max(x, shuffle_xor(x, mask));
    return x;
}

INLINE float block_sum(float x, threadgroup float *scratch, uint thread_of_block, uint threads) {
    x = warp_sum(x);
    if (threads == 32) return x;
    if (thread_of_block % 32 == 0) scratch[thread_of_block / 32] = x;
    BARRIER();
    x = warp_sum(thread_of_block % 32 < threads / 32 ? scratch[thread_of_block % 32] : 0.0f);
    BARRIER();
    return x;
}

INLINE void load16(device const float *p, thread float *out) {
    float4 a = *reinterpret_cast<device const float4 *>(p), b = *reinterpret_cast<device const float4 *>(p + 4);
    UNROLL for (uint i = 0; i < 4; ++i) out[i] = a[i], out[4 + i] = b[i];
}
INLINE void store16(device float *p, thread const float *v) {
    float4 a, b;
    UNROLL for (uint i = 0; i < 4; ++i) a[i] = v[i], b[i] = v[4 + i];
    *reinterpret_cast<device float4 *>(p) = a;
    *reinterpret_cast<device float4 *>(p + 4) = b;
}
#if !defined(ELEMENT_F32)
INLINE void load16(device const Element *p, thread float *out) {
    Element4 a = *reinterpret_cast<device const Element4 *>(p), b = *reinterpret_cast<device const Element4 *>(p + 4);
    UNROLL for (uint i = 0; i < 4; ++i) out[i] = float(a[i]), out[4 + i] = float(b[i]);
}
INLINE void store16(device Element *p, thread const float *v) {
    Element4 a, b;
    UNROLL for (uint i = 0; i < 4; ++i) a[i] = Element(v[i]), b[i] = Element(v[4 + i]);
    *reinterpret_cast<device Element4 *>(p) = a;
    *reinterpret_cast<device Element4 *>(p + 4) = b;
}
#endif

template <typename T>
INLINE void load8(device const T *p, index_t at, uint count, bool aligned, thread float *out) {
    if (aligned && count >= 8) {
        load16(p + at, out);
        return;
    }
    UNROLL for (uint i = 0; i < 8; ++i) out[i] = i < count ? float(p[at + i]) : 0.0f;
}
template <typename T>
INLINE void store8(device T *p, index_t at, uint count, bool aligned, thread const float *values) {
    if (aligned && count >= 8) {
        store16(p + at, values);
        return;
    }
    UNROLL for (uint i = 0; i < 8; ++i)
        if (i < count) p[at + i] = T(values[i]);
}
