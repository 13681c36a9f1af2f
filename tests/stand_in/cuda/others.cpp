// What starts with the program and does nothing, and what a build needs by name and no path of gneiss calls: it ends the
// process with its name.
#include "device.h"

#include <cstdio>
#include <random>
#include <unistd.h>

namespace {

[[noreturn]] void refuse(const char *name) {
    fprintf(stderr, "stand-in CUDA: fault: %s is not in the stand-in (tests/stand_in/cuda)\n", name);
    fflush(nullptr);
    _exit(stand_in::FAULT_EXIT);
}

struct Generator {
    CUstream stream = nullptr;
    std::mt19937 values;
};

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

// candle makes a generator of random numbers with each device; models of random weights are drawn by it.
int curandCreateGenerator(Generator **generator, int) {
    *generator = new Generator();
    return 0;
}
int curandDestroyGenerator(Generator *generator) {
    delete generator;
    return 0;
}
int curandSetPseudoRandomGeneratorSeed(Generator *generator, unsigned long long seed) {
    generator->values.seed(unsigned(seed));
    return 0;
}
int curandSetStream(Generator *generator, CUstream stream) {
    generator->stream = stream;
    return 0;
}
REFUSED(curandGenerateNormalDouble)

int curandGenerateNormal(Generator *generator, float *to, size_t count, float mean, float deviation) {
    return stand_in::call([&] {
        stand_in::Stream &on = stand_in::stream(generator->stream, "curandGenerateNormal");
        const auto place = stand_in::find(reinterpret_cast<CUdeviceptr>(to), count * sizeof(float), "curandGenerateNormal");
        std::mt19937 values = generator->values;
        generator->values.discard(1);
        stand_in::enqueue(on, "curandGenerateNormal", {place}, [=]() mutable {
            std::normal_distribution<float> normal(mean, deviation);
            for (size_t i = 0; i < count; ++i) reinterpret_cast<float *>(place.data())[i] = normal(values);
        });
        return CUDA_SUCCESS;
    });
}

REFUSED(cublasDgemmStridedBatched)

} // extern "C"

// cuda.h declares these with their arguments, which do not matter here.
extern "C" {
CUresult cuCtxDestroy_v2(CUcontext) { refuse("cuCtxDestroy"); }
CUresult cuMemcpyPeerAsync(CUdeviceptr, CUcontext, CUdeviceptr, CUcontext, size_t, CUstream) { refuse("cuMemcpyPeerAsync"); }
CUresult cuModuleLoad(CUmodule *, const char *) { refuse("cuModuleLoad"); }
}
