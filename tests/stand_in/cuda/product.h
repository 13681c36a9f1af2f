// A matrix product as BLAS has it: columns first.
#pragma once
#include "device.h"

namespace stand_in {

// Numbers of cudaDataType_t and cublasComputeType_t (library_types.h and cublas_api.h of CUDA 13).
constexpr int R_32F = 0, R_16F = 2, R_16BF = 14, COMPUTE_32F = 68;
// cublasStatus_t.
constexpr int SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, NOT_SUPPORTED = 15;

// A matrix of a product, whose columns begin `lead` elements after each other.
struct Matrix {
    CUdeviceptr address = 0;
    int dtype = R_32F;
    int64_t lead = 0;
    int64_t stride = 0; // elements between the matrices of a batch
};

// D [m, n] = alpha op(A) op(B) + beta C, + bias [m] for each column if there is one.
struct Product {
    std::string who;
    int64_t m = 0, n = 0, k = 0, batch = 1;
    bool transpose_a = false, transpose_b = false;
    float alpha = 1, beta = 0;
    Matrix a, b, c, d;
    CUdeviceptr bias = 0;
    int bias_dtype = R_32F;
};

// Bytes of an element; 0 for a dtype that is not in the stand-in.
uint64_t bytes_of(int dtype);
// Checks a product and adds it to the stream's work: a status of cuBLAS. Throws Fault.
int multiply(Stream &stream, const Product &product);

} // namespace stand_in
