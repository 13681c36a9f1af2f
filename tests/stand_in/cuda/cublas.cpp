// cuBLAS: handles, and the products that gneiss and candle call.
#include "product.h"

using namespace stand_in;

namespace {

constexpr int OP_N = 0, OP_T = 1;

struct Handle {
    Device *owner;
    CUstream stream;
    int math_mode;
};

// Runs the body of a call of cuBLAS: a Fault that it throws is CUBLAS_STATUS_EXECUTION_FAILED.
template <typename F>
int status(F body) {
    LOCKED;
    try {
        return body();
    } catch (const Fault &problem) {
        fault(problem.what());
        return 13;
    } catch (const Refusal &) {
        return 13;
    }
}

float scalar(const void *given) { return *static_cast<const float *>(given); }

Matrix matrix(const void *address, int dtype, int lead, int64_t stride = 0) {
    return {reinterpret_cast<CUdeviceptr>(address), dtype, lead, stride};
}

int run(Handle *handle, Product product, int op_a, int op_b, int compute) {
    if (!handle || handle->owner != current()) throw Fault(product.who + ": the handle is another context's than the current one");
    if ((op_a != OP_N && op_a != OP_T) || (op_b != OP_N && op_b != OP_T)) return INVALID_VALUE;
    if (compute != COMPUTE_32F)
        throw Fault(product.who + ": compute type " + std::to_string(compute) + " is not in the stand-in, only CUBLAS_COMPUTE_32F is");
    product.transpose_a = op_a == OP_T;
    product.transpose_b = op_b == OP_T;
    // In the default mode sums may be reduced in 16 bits.
    const bool half = product.a.dtype != R_32F;
    count("product in 16 bits", half && !(handle->math_mode & 16) ? "sums may be 16 bits" : half ? "sums are f32" : "none", 0);
    return multiply(stream(handle->stream, product.who), product);
}

} // namespace

extern "C" {

int cublasCreate_v2(Handle **made) {
    return status([&] {
        // cuBLAS 13 needs a driver of CUDA 13.
        if (!current() || settings().driver < 13000) return NOT_INITIALIZED;
        *made = new Handle{current(), nullptr, 0};
        return SUCCESS;
    });
}
int cublasDestroy_v2(Handle *handle) {
    delete handle;
    return SUCCESS;
}
int cublasSetStream_v2(Handle *handle, CUstream stream) {
    handle->stream = stream;
    return SUCCESS;
}
int cublasSetMathMode(Handle *handle, int mode) {
    handle->math_mode = mode;
    return SUCCESS;
}
int cublasSetWorkspace_v2(Handle *handle, void *address, size_t bytes) {
    return status([&] {
        const Place place = find(reinterpret_cast<CUdeviceptr>(address), bytes, "cublasSetWorkspace");
        if (place.memory->owner != handle->owner) throw Fault("cublasSetWorkspace: memory of another device");
        if (place.memory->address % 256) throw Fault("cublasSetWorkspace: expected a multiple of 256 bytes");
        return SUCCESS;
    });
}

int cublasGemmEx(Handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int dtype_a, int lead_a,
                 const void *b, int dtype_b, int lead_b, const void *beta, void *c, int dtype_c, int lead_c, int compute, int) {
    return status([&] {
        Product p;
        p.who = "cublasGemmEx";
        p.m = m, p.n = n, p.k = k;
        p.alpha = scalar(alpha), p.beta = scalar(beta);
        p.a = matrix(a, dtype_a, lead_a), p.b = matrix(b, dtype_b, lead_b);
        p.c = p.d = matrix(c, dtype_c, lead_c);
        return run(handle, p, op_a, op_b, compute);
    });
}

int cublasGemmStridedBatchedEx(Handle *handle, int op_a, int op_b, int m, int n, int k, const void *alpha, const void *a, int dtype_a,
                               int lead_a, long long stride_a, const void *b, int dtype_b, int lead_b, long long stride_b,
                               const void *beta, void *c, int dtype_c, int lead_c, long long stride_c, int batch, int compute, int) {
    return status([&] {
        Product p;
        p.who = "cublasGemmStridedBatchedEx";
        p.m = m, p.n = n, p.k = k, p.batch = batch;
        p.alpha = scalar(alpha), p.beta = scalar(beta);
        p.a = matrix(a, dtype_a, lead_a, stride_a), p.b = matrix(b, dtype_b, lead_b, stride_b);
        p.c = p.d = matrix(c, dtype_c, lead_c, stride_c);
        return run(handle, p, op_a, op_b, compute);
    });
}

} // extern "C"
