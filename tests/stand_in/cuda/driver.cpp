// The driver's calls: devices, contexts, memory, pools. Copies and streams are in stream.cpp, modules and launches in modules.cpp.
#include "device.h"
#include "graphs.h"
#include "modules.h"

#include <cstdlib>
#include <cstring>

using namespace stand_in;

namespace {

bool initialised = false;

Device *of(CUdevice device) {
    return device >= 0 && device < settings().devices ? &stand_in::device(device) : nullptr;
}
Device *of(CUcontext context) {
    for (int i = 0; i < settings().devices; ++i)
        if (reinterpret_cast<Device *>(context) == &stand_in::device(i)) return &stand_in::device(i);
    return nullptr;
}

} // namespace

#define NEED_INIT \
    if (!initialised) return CUDA_ERROR_NOT_INITIALIZED
#define NEED_CONTEXT \
    if (!current()) return CUDA_ERROR_INVALID_CONTEXT

extern "C" {

CUresult cuInit(unsigned flags) {
    return call([&] {
        if (flags) return CUDA_ERROR_INVALID_VALUE;
        if (settings().devices == 0) return CUDA_ERROR_NO_DEVICE;
        initialised = true;
        return CUDA_SUCCESS;
    });
}

CUresult cuDriverGetVersion(int *version) {
    *version = settings().driver;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
    switch (error) {
#define NAME(e) \
    case e: *name = #e; return CUDA_SUCCESS
        NAME(CUDA_SUCCESS);
        NAME(CUDA_ERROR_INVALID_VALUE);
        NAME(CUDA_ERROR_OUT_OF_MEMORY);
        NAME(CUDA_ERROR_NOT_INITIALIZED);
        NAME(CUDA_ERROR_NO_DEVICE);
        NAME(CUDA_ERROR_INVALID_DEVICE);
        NAME(CUDA_ERROR_INVALID_CONTEXT);
        NAME(CUDA_ERROR_NO_BINARY_FOR_GPU);
        NAME(CUDA_ERROR_INVALID_PTX);
        NAME(CUDA_ERROR_UNSUPPORTED_PTX_VERSION);
        NAME(CUDA_ERROR_INVALID_HANDLE);
        NAME(CUDA_ERROR_NOT_FOUND);
        NAME(CUDA_ERROR_NOT_READY);
        NAME(CUDA_ERROR_ILLEGAL_ADDRESS);
        NAME(CUDA_ERROR_NOT_SUPPORTED);
        NAME(CUDA_ERROR_ILLEGAL_STATE);
        NAME(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        NAME(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        NAME(CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        NAME(CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
        NAME(CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
        NAME(CUDA_ERROR_CAPTURED_EVENT);
#undef NAME
    default: *name = nullptr; return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuGetErrorString(CUresult error, const char **text) {
    switch (error) {
    case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; return CUDA_SUCCESS;
    case CUDA_ERROR_NO_DEVICE: *text = "no CUDA-capable device is detected"; return CUDA_SUCCESS;
    case CUDA_ERROR_INVALID_DEVICE: *text = "invalid device ordinal"; return CUDA_SUCCESS;
    case CUDA_ERROR_UNSUPPORTED_PTX_VERSION:
        *text = "the provided PTX was compiled with an unsupported toolchain.";
        return CUDA_SUCCESS;
    case CUDA_ERROR_NO_BINARY_FOR_GPU: *text = "no kernel image is available for execution on the device"; return CUDA_SUCCESS;
    default: return cuGetErrorName(error, text);
    }
}

CUresult cuDeviceGetCount(int *count) {
    NEED_INIT;
    *count = settings().devices;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    NEED_INIT;
    if (!of(ordinal)) return CUDA_ERROR_INVALID_DEVICE;
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    NEED_INIT;
    if (!of(device)) return CUDA_ERROR_INVALID_DEVICE;
    snprintf(name, length, "gneiss stand-in");
    return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem_v2(size_t *bytes, CUdevice device) {
    NEED_INIT;
    if (!of(device)) return CUDA_ERROR_INVALID_DEVICE;
    *bytes = settings().memory;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    return call([&] {
        NEED_INIT;
        if (!of(device)) return CUDA_ERROR_INVALID_DEVICE;
        switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = settings().capability / 10; break;
        case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = settings().capability % 10; break;
        case CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED: *value = settings().pools; break;
        case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS:
        case CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS_USES_HOST_PAGE_TABLES: *value = settings().coherent != 0; break;
        case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
        case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
        case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = MAX_SHARED; break;
        default: throw Fault("cuDeviceGetAttribute: attribute " + std::to_string(attribute) + " is not in the stand-in");
        }
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    return call([&] {
        NEED_INIT;
        if (!of(device)) return CUDA_ERROR_INVALID_DEVICE;
        of(device)->retained = true;
        count("device", std::to_string(device));
        *context = reinterpret_cast<CUcontext>(of(device));
        return CUDA_SUCCESS;
    });
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
    return call([&] { return of(device) ? run_all(*of(device)) : CUDA_ERROR_INVALID_DEVICE; });
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    NEED_INIT;
    *context = reinterpret_cast<CUcontext>(current());
    return CUDA_SUCCESS;
}

CUresult cuCtxSetCurrent(CUcontext context) {
    return call([&] {
        NEED_INIT;
        if (context && (!of(context) || !of(context)->retained)) return CUDA_ERROR_INVALID_CONTEXT;
        current() = of(context);
        return CUDA_SUCCESS;
    });
}

CUresult cuCtxSynchronize(void) {
    return call([&] {
        NEED_CONTEXT;
        refuse_in_capture_of(*current());
        count("wait", "context");
        return run_all(*current());
    });
}

// Memory.

CUresult cuMemGetInfo_v2(size_t *free, size_t *total) {
    return call([&] {
        NEED_CONTEXT;
        *total = settings().memory;
        *free = settings().memory - current()->taken();
        return CUDA_SUCCESS;
    });
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
    return call([&] {
        NEED_CONTEXT;
        refuse_in_capture();
        count("allocation", "cuMemAlloc", bytes);
        return allocate(*current(), bytes, false, address);
    });
}

CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream handle) {
    return call([&] {
        Stream &on = stream(handle, "cuMemAllocAsync");
        if (!settings().pools) return CUDA_ERROR_NOT_SUPPORTED;
        count("allocation", "cuMemAllocAsync", bytes);
        if (on.capture) return record_allocation(on, bytes, address);
        return allocate(*current(), bytes, true, address);
    });
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    return call([&] {
        NEED_CONTEXT;
        refuse_in_capture();
        count("free", "cuMemFree");
        auto memory = retire(address, "cuMemFree");
        if (memory->pending) throw Fault("cuMemFree: work that has not run uses the memory at " + hex(address));
        memory->release();
        return CUDA_SUCCESS;
    });
}

CUresult cuMemFreeAsync(CUdeviceptr address, CUstream handle) {
    return call([&] {
        Stream &on = stream(handle, "cuMemFreeAsync");
        count("free", "cuMemFreeAsync");
        if (on.capture) return record_free(on, address);
        auto memory = retire(address, "cuMemFreeAsync");
        enqueue(on, "free", {}, [memory] { memory->release(); });
        return CUDA_SUCCESS;
    });
}

CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned) {
    return call([&] {
        NEED_CONTEXT;
        refuse_in_capture();
        count("allocation", "cuMemHostAlloc", bytes);
        void *data = bytes ? aligned_alloc(4096, (bytes + 4095) / 4096 * 4096) : nullptr;
        if (!data) return bytes ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE;
        memset(data, 0xff, bytes);
        pinned()[reinterpret_cast<uintptr_t>(data)].reset(new HostMemory{static_cast<unsigned char *>(data), bytes});
        *address = data;
        return CUDA_SUCCESS;
    });
}

CUresult cuMemFreeHost(void *address) {
    return call([&] {
        refuse_in_capture();
        const auto found = pinned().find(reinterpret_cast<uintptr_t>(address));
        if (found == pinned().end()) throw Fault("cuMemFreeHost: no page-locked memory begins there");
        found->second->freed = true;
        pinned().erase(found);
        free(address);
        return CUDA_SUCCESS;
    });
}

// Pools: a device has its default one, whose handle is the device.

CUresult cuDeviceGetMemPool(CUmemoryPool *pool, CUdevice device) {
    if (!of(device)) return CUDA_ERROR_INVALID_DEVICE;
    *pool = reinterpret_cast<CUmemoryPool>(of(device));
    return settings().pools ? CUDA_SUCCESS : CUDA_ERROR_NOT_SUPPORTED;
}
CUresult cuDeviceGetDefaultMemPool(CUmemoryPool *pool, CUdevice device) { return cuDeviceGetMemPool(pool, device); }

CUresult cuMemPoolSetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    return call([&] {
        Device *owner = of(reinterpret_cast<CUcontext>(pool));
        if (!owner) return CUDA_ERROR_INVALID_VALUE;
        const cuuint64_t given = *static_cast<cuuint64_t *>(value);
        const bool high = attribute == CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH || attribute == CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        if (high && given) return CUDA_ERROR_INVALID_VALUE; // they can only begin anew
        if (attribute == CU_MEMPOOL_ATTR_RELEASE_THRESHOLD) owner->threshold = given;
        else if (attribute == CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH) owner->most_reserved = owner->reserved;
        else if (attribute == CU_MEMPOOL_ATTR_USED_MEM_HIGH) owner->most_pooled = owner->pooled;
        else throw Fault("cuMemPoolSetAttribute: attribute " + std::to_string(attribute) + " is not in the stand-in");
        if (!high) count("pool", "release threshold set");
        return CUDA_SUCCESS;
    });
}

CUresult cuMemPoolGetAttribute(CUmemoryPool pool, CUmemPool_attribute attribute, void *value) {
    return call([&] {
        const Device *owner = of(reinterpret_cast<CUcontext>(pool));
        if (!owner) return CUDA_ERROR_INVALID_VALUE;
        cuuint64_t &to = *static_cast<cuuint64_t *>(value);
        switch (attribute) {
        case CU_MEMPOOL_ATTR_RELEASE_THRESHOLD: to = owner->threshold; break;
        case CU_MEMPOOL_ATTR_RESERVED_MEM_CURRENT: to = owner->reserved; break;
        case CU_MEMPOOL_ATTR_RESERVED_MEM_HIGH: to = owner->most_reserved; break;
        case CU_MEMPOOL_ATTR_USED_MEM_CURRENT: to = owner->pooled; break;
        case CU_MEMPOOL_ATTR_USED_MEM_HIGH: to = owner->most_pooled; break;
        default: throw Fault("cuMemPoolGetAttribute: attribute " + std::to_string(attribute) + " is not in the stand-in");
        }
        return CUDA_SUCCESS;
    });
}

CUresult cuMemPoolTrimTo(CUmemoryPool pool, size_t keep) {
    return call([&] {
        Device *owner = of(reinterpret_cast<CUcontext>(pool));
        if (!owner) return CUDA_ERROR_INVALID_VALUE;
        count("pool", "trimmed");
        owner->give_back(keep);
        return CUDA_SUCCESS;
    });
}

} // extern "C"
