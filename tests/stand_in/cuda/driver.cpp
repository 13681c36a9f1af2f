// The driver's calls: contexts, memory, copies, streams, events. Modules and launches are in modules.cpp.
#include "device.h"
#include "modules.h"

#include <chrono>
#include <cstdlib>
#include <cstring>
#include <sys/uio.h>
#include <unistd.h>

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
Event &of(CUevent event) { return *reinterpret_cast<Event *>(event); }

// FNV-1a of host memory; throws Fault if it can't be read (it was unmapped).
uint64_t fingerprint(const void *from, uint64_t bytes) {
    uint64_t hash = 1469598103934665603u;
    std::vector<unsigned char> part(std::min<uint64_t>(bytes, 1 << 20));
    for (uint64_t at = 0; at < bytes; at += part.size()) {
        const uint64_t n = std::min<uint64_t>(part.size(), bytes - at);
        iovec to{part.data(), n}, source{const_cast<char *>(static_cast<const char *>(from)) + at, n};
        if (process_vm_readv(getpid(), &to, 1, &source, 1, 0) != ssize_t(n))
            throw Fault("the host memory of an upload can't be read any more");
        for (uint64_t i = 0; i < n; ++i) hash = (hash ^ part[i]) * 1099511628211u;
    }
    return hash;
}

// An upload that reads host memory when it runs: the memory must not have changed by then.
void upload_late(Stream &stream, const Place &to, const void *from, uint64_t bytes, std::shared_ptr<HostMemory> page_locked) {
    const uint64_t expected = fingerprint(from, bytes);
    enqueue(stream, "upload", {to}, [=] {
        if (page_locked && page_locked->freed) throw Fault("the page-locked memory was freed before the copy from it ran");
        if (fingerprint(from, bytes) != expected)
            throw Fault("the host memory was changed or freed before the copy from it ran");
        memcpy(to.data(), from, bytes);
    });
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
        count("allocation", "cuMemAlloc", bytes);
        return allocate(*current(), bytes, false, address);
    });
}

CUresult cuMemAllocAsync(CUdeviceptr *address, size_t bytes, CUstream handle) {
    return call([&] {
        stream(handle, "cuMemAllocAsync");
        if (!settings().pools) return CUDA_ERROR_NOT_SUPPORTED;
        count("allocation", "cuMemAllocAsync", bytes);
        return allocate(*current(), bytes, true, address);
    });
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    return call([&] {
        NEED_CONTEXT;
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
        auto memory = retire(address, "cuMemFreeAsync");
        enqueue(on, "free", {}, [memory] { memory->release(); });
        return CUDA_SUCCESS;
    });
}

CUresult cuMemHostAlloc(void **address, size_t bytes, unsigned) {
    return call([&] {
        NEED_CONTEXT;
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

// Copies and fills.

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream handle) {
    return call([&] {
        Stream &on = stream(handle, "cuMemcpyHtoDAsync");
        const auto page_locked = pinned_around(from);
        count("copy", page_locked ? "to the device, page-locked" : "to the device", bytes);
        const Place place = find(to, bytes, "cuMemcpyHtoDAsync");
        if (!place.exists()) {
            enqueue(on, "upload", {place}, [] {});
        } else if (page_locked || (settings().coherent && bytes > settings().coherent)) {
            upload_late(on, place, from, bytes, page_locked);
        } else {
            // Pageable memory is staged before the call returns.
            const auto *first = static_cast<const unsigned char *>(from);
            auto staged = std::make_shared<std::vector<unsigned char>>(first, first + bytes);
            enqueue(on, "upload", {place}, [=] { memcpy(place.data(), staged->data(), staged->size()); });
        }
        return CUDA_SUCCESS;
    });
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t bytes, CUstream handle) {
    return call([&] {
        Stream &on = stream(handle, "cuMemcpyDtoHAsync");
        const auto page_locked = pinned_around(to);
        count("copy", page_locked ? "to the host, page-locked" : "to the host", bytes);
        const Place place = find(from, bytes, "cuMemcpyDtoHAsync");
        // What is there before the copy has run is nobody's.
        memset(to, place.exists() ? 0xff : 0, bytes);
        enqueue(on, "download", {place}, [=] {
            if (page_locked && page_locked->freed) throw Fault("the page-locked memory was freed before the copy to it ran");
            memcpy(to, place.data(), bytes);
        });
        // To pageable memory the call returns when the copy is done.
        return page_locked ? CUDA_SUCCESS : run(on);
    });
}

CUresult cuMemcpyDtoDAsync_v2(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle) {
    return call([&] {
        Stream &on = stream(handle, "cuMemcpyDtoDAsync");
        count("copy", "on the device", bytes);
        const Place target = find(to, bytes, "cuMemcpyDtoDAsync, target");
        const Place source = find(from, bytes, "cuMemcpyDtoDAsync, source");
        enqueue(on, "copy", {target, source}, [=] { memmove(target.data(), source.data(), bytes); });
        return CUDA_SUCCESS;
    });
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t bytes, CUstream handle) {
    return call([&] {
        Stream &on = stream(handle, "cuMemsetD8Async");
        count("fill", "cuMemsetD8Async", bytes);
        const Place place = find(to, bytes, "cuMemsetD8Async");
        enqueue(on, "fill", {place}, [=] { memset(place.data(), value, bytes); });
        return CUDA_SUCCESS;
    });
}

// Streams and events.

CUresult cuStreamCreate(CUstream *made, unsigned) {
    return call([&] {
        NEED_CONTEXT;
        *made = reinterpret_cast<CUstream>(make_stream(*current()));
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    return call([&] { return drop_stream(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; });
}

CUresult cuStreamSynchronize(CUstream handle) {
    return call([&] {
        Stream &on = stream(handle, "cuStreamSynchronize");
        count("wait", "stream");
        return run(on);
    });
}

CUresult cuStreamIsCapturing(CUstream, CUstreamCaptureStatus *status) {
    *status = CU_STREAM_CAPTURE_STATUS_NONE;
    return CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
    return call([&] {
        Stream &on = stream(handle, "cuStreamWaitEvent");
        Stream *before = of(event).stream;
        const uint64_t at = of(event).at;
        if (before && before != &on) enqueue(on, "wait for an event", {}, [=] { run(*before, at); });
        return CUDA_SUCCESS;
    });
}

CUresult cuEventCreate(CUevent *made, unsigned flags) {
    return call([&] {
        NEED_CONTEXT;
        count("event", "created");
        Event *event = new Event();
        event->owner = current();
        event->timed = !(flags & CU_EVENT_DISABLE_TIMING);
        *made = reinterpret_cast<CUevent>(event);
        return CUDA_SUCCESS;
    });
}

CUresult cuEventDestroy_v2(CUevent event) {
    // Work that is still to run may mark it, so it stays.
    return event ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuEventRecord(CUevent handle, CUstream on_handle) {
    return call([&] {
        Stream &on = stream(on_handle, "cuEventRecord");
        Event &event = of(handle);
        if (event.owner != on.owner) return CUDA_ERROR_INVALID_HANDLE;
        count("event", "recorded");
        event.stream = &on;
        event.ran = false;
        enqueue(on, "event", {}, [&event] {
            event.ran = true;
            event.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
        });
        event.at = on.issued;
        return CUDA_SUCCESS;
    });
}

CUresult cuEventSynchronize(CUevent handle) {
    return call([&] {
        Event &event = of(handle);
        count("wait", "event");
        return event.stream ? run(*event.stream, event.at) : CUDA_SUCCESS;
    });
}

CUresult cuEventQuery(CUevent handle) {
    return call([&] {
        Event &event = of(handle);
        if (!event.stream || event.ran) return CUDA_SUCCESS;
        // The next question finds it done.
        const CUresult result = run(*event.stream, event.at);
        return result == CUDA_SUCCESS ? CUDA_ERROR_NOT_READY : result;
    });
}

CUresult cuEventElapsedTime_v2(float *milliseconds, CUevent from, CUevent to) {
    return call([&] {
        const Event &first = of(from), &last = of(to);
        if (!first.stream || !last.stream || !first.timed || !last.timed) return CUDA_ERROR_INVALID_HANDLE;
        if (!first.ran || !last.ran) return CUDA_ERROR_NOT_READY;
        *milliseconds = float((last.seconds - first.seconds) * 1000);
        return CUDA_SUCCESS;
    });
}

} // extern "C"
