// The dialect of README.md for CUDA.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>
#include <stdint.h>

typedef unsigned int uint;
typedef unsigned long long index_t;

#define INLINE static __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define GLOBAL(T) T *
#define GROUP(T) T *
#define LOCAL(T) T *
#define IN(i, T, name) const T *__restrict__ name
#define OUT(i, T, name) T *__restrict__ name
#define PARAMETERS(i, S, name) const S name
#define GIVEN(S) const S &
#define KERNEL(name, max_threads, ...) extern "C" __global__ void __launch_bounds__(max_threads) name(__VA_ARGS__)
#define KERNEL_FITTING(name, max_threads, blocks, ...) \
    extern "C" __global__ void __launch_bounds__(max_threads, blocks) name(__VA_ARGS__)
#define SHARED(T, name, count) __shared__ __align__(16) T name[count]
#define DYNAMIC_SHARED(T, name) \
    extern __shared__ __align__(16) unsigned char dynamic_shared_bytes[]; \
    T *name = reinterpret_cast<T *>(dynamic_shared_bytes)
#define THREAD (threadIdx.x)
#define THREADS (blockDim.x)
#define LANE (threadIdx.x % 32)
#define WARP (threadIdx.x / 32)
#define BLOCK_X (blockIdx.x)
#define BLOCK_Y (blockIdx.y)
#define BLOCK_Z (blockIdx.z)
#define BARRIER() __syncthreads()
#define WARP_BARRIER() __syncwarp()
#define NEGATIVE_INFINITY (-CUDART_INF_F)

#if defined(ELEMENT_BF16)
typedef __nv_bfloat16 Element;
INLINE float wide(Element e) { return __bfloat162float(e); }
INLINE Element narrow(float f) { return __float2bfloat16_rn(f); }
INLINE uint pack2(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<uint *>(&both);
}
INLINE void unpack2(uint both, float *out) {
    float2 f = __bfloat1622float2(*reinterpret_cast<__nv_bfloat162 *>(&both));
    out[0] = f.x;
    out[1] = f.y;
}
#elif defined(ELEMENT_F16)
typedef __half Element;
INLINE float wide(Element e) { return __half2float(e); }
INLINE Element narrow(float f) { return __float2half_rn(f); }
INLINE uint pack2(float low, float high) {
    __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<uint *>(&both);
}
INLINE void unpack2(uint both, float *out) {
    float2 f = __half22float2(*reinterpret_cast<__half2 *>(&both));
    out[0] = f.x;
    out[1] = f.y;
}
#elif defined(ELEMENT_F32)
typedef float Element;
INLINE Element narrow(float f) { return f; }
#else
#error "define ELEMENT_F32, ELEMENT_BF16 or ELEMENT_F16"
#endif
#if !defined(ELEMENT_F32)
INLINE float wide(float f) { return f; }
#else
INLINE float wide(Element e) { return e; }
#endif

INLINE float exp_(float x) { return __expf(x); }
// Within 2 ulp; of infinity and of more than 2^126 it is 0.
INLINE float reciprocal_(float x) { return __fdividef(1.0f, x); }
INLINE float log_(float x) { return logf(x); }
INLINE float sqrt_(float x) { return sqrtf(x); }
INLINE float rsqrt_(float x) { return 1.0f / sqrtf(x); }
INLINE float max_(float a, float b) { return fmaxf(a, b); }
INLINE float min_(float a, float b) { return fminf(a, b); }

INLINE float shuffle_xor(float x, uint mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
INLINE float warp_sum(float x) {
    UNROLL for (uint mask = 16; mask; mask /= 2) x += shuffle_xor(x, mask);
    return x;
}
INLINE float warp_max(float x) {
    UNROLL for (uint mask = 16; mask; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
    return x;
}

INLINE float block_sum(float x, float *scratch, uint thread, uint threads) {
    x = warp_sum(x);
    if (threads == 32) return x;
    if (thread % 32 == 0) scratch[thread / 32] = x;
    BARRIER();
    x = warp_sum(thread % 32 < threads / 32 ? scratch[thread % 32] : 0.0f);
    BARRIER();
    return x;
}

INLINE void load16(const float *p, float *out) {
    float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
}
INLINE void store16(float *p, const float *v) {
    reinterpret_cast<float4 *>(p)[0] = make_float4(v[0], v[1], v[2], v[3]);
    reinterpret_cast<float4 *>(p)[1] = make_float4(v[4], v[5], v[6], v[7]);
}
#if !defined(ELEMENT_F32)
INLINE void load16(const Element *p, float *out) {
    uint4 all = *reinterpret_cast<const uint4 *>(p);
    unpack2(all.x, out);
    unpack2(all.y, out + 2);
    unpack2(all.z, out + 4);
    unpack2(all.w, out + 6);
}
INLINE void store16(Element *p, const float *v) {
    *reinterpret_cast<uint4 *>(p) =
        make_uint4(pack2(v[0], v[1]), pack2(v[2], v[3]), pack2(v[4], v[5]), pack2(v[6], v[7]));
}
INLINE void place(Element *p, float f) { *p = narrow(f); }
#endif
INLINE void place(float *p, float f) { *p = f; }

template <typename T>
INLINE void load8(const T *p, index_t at, uint count, bool aligned, float *out) {
    if (aligned && count >= 8) {
        load16(p + at, out);
        return;
    }
    UNROLL for (uint i = 0; i < 8; ++i) out[i] = i < count ? wide(p[at + i]) : 0.0f;
}
template <typename T>
INLINE void store8(T *p, index_t at, uint count, bool aligned, const float *values) {
    if (aligned && count >= 8) {
        store16(p + at, values);
        return;
    }
    UNROLL for (uint i = 0; i < 8; ++i)
        if (i < count) place(p + at + i, values[i]);
}

#if !defined(ELEMENT_F32)
INLINE uint load_pair(const Element *p, index_t at) { return *reinterpret_cast<const uint *>(p + at); }
INLINE void store_pair(Element *p, index_t at, uint both) { *reinterpret_cast<uint *>(p + at) = both; }
INLINE uint shared_address(const void *p) { return static_cast<uint>(__cvta_generic_to_shared(p)); }
INLINE void cp_async16(Element *to, const Element *from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(valid ? 16 : 0)
                 : "memory");
}
INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int newest>
INLINE void cp_async_wait_all_but() { asm volatile("cp.async.wait_group %0;" ::"n"(newest) : "memory"); }
#define cp_async_wait(n) cp_async_wait_all_but<n>()
INLINE void ldmatrix4(uint *r, const Element *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
INLINE void ldmatrix4_transposed(uint *r, const Element *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#if defined(ELEMENT_BF16)
#define MMA_TYPES "bf16.bf16"
#else
#define MMA_TYPES "f16.f16"
#endif
INLINE void mma_16x8x16(float *d, const uint *a, const uint *b) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." MMA_TYPES
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif
