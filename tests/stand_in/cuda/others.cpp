// What starts with the program and does nothing, and what a build needs by name and no path of gneiss calls: it ends the
// process with its name.
#include "device.h"

#include <cstdio>
#include <unistd.h>

namespace {

[[noreturn]] void refuse(const char *name) {
    fprintf(stderr, "stand-in CUDA: fault: %s is not in the stand-in (tests/stand_in/cuda)\n", name);
    fflush(nullptr);
    _exit(stand_in::FAULT_EXIT);
}

} // namespace

#define REFUSED(name) \
    __attribute__((visibility("default"))) int name() { refuse(#name); }

extern "C" {

// candle's kernels in machine code (experts, quantized products) are registered before main. None of them is launched.
void **__cudaRegisterFatBinary(void *) {
    static void *handle;
    return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *, char *, const char *, int, void *, void *, void *, void *, int *) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
REFUSED(__cudaGetKernel)
REFUSED(__cudaLaunchKernel_ptsz)
REFUSED(__cudaPopCallConfiguration)
REFUSED(__cudaPushCallConfiguration)
REFUSED(cudaFuncSetAttribute)
REFUSED(cudaGetDevice)

// candle makes a generator of random numbers with each device. gneiss draws on the CPU.
int curandCreateGenerator(void **generator, int) {
    static int made;
    *generator = &made;
    return 0;
}
int curandDestroyGenerator(void *) { return 0; }
int curandSetPseudoRandomGeneratorSeed(void *, unsigned long long) { return 0; }
int curandSetStream(void *, CUstream) { return 0; }
REFUSED(curandGenerateNormal)
REFUSED(curandGenerateNormalDouble)

REFUSED(cublasDgemmStridedBatched)

} // extern "C"

// cuda.h declares these with their arguments, which do not matter here.
extern "C" {
CUresult cuCtxDestroy_v2(CUcontext) { refuse("cuCtxDestroy"); }
CUresult cuMemPoolGetAttribute(CUmemoryPool, CUmemPool_attribute, void *) { refuse("cuMemPoolGetAttribute"); }
CUresult cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream) { refuse("cuMemcpyPeerAsync"); }
CUresult cuModuleLoad(CUmodule *, const char *) { refuse("cuModuleLoad"); }
}
