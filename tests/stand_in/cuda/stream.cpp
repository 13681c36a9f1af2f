// The driver's calls: copies, fills, streams, events.
#include "device.h"
#include "graphs.h"

#include <chrono>
#include <cstring>
#include <sys/uio.h>
#include <unistd.h>

using namespace stand_in;

namespace {

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

extern "C" {

// Copies and fills.

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t bytes, CUstream handle) {
    return call([&] {
        Stream &on = stream(handle, "cuMemcpyHtoDAsync");
        const auto page_locked = pinned_around(from);
        count("copy", page_locked ? "to the device, page-locked" : "to the device", bytes);
        const Place place = find(to, bytes, "cuMemcpyHtoDAsync");
        if (on.capture && !page_locked) refuse_pageable(on);
        if (on.capture) {
            // It reads the memory at each launch.
            enqueue(on, "upload", {place}, [=] { memcpy(place.data(), from, bytes); });
        } else if (!place.exists()) {
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
        if (on.capture && !page_locked) refuse_pageable(on);
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

CUresult cuStreamCreate(CUstream *made, unsigned flags) {
    return call([&] {
        if (!current()) return CUDA_ERROR_INVALID_CONTEXT;
        Stream *stream = make_stream(*current());
        stream->blocking = !(flags & CU_STREAM_NON_BLOCKING);
        *made = reinterpret_cast<CUstream>(stream);
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamDestroy_v2(CUstream handle) {
    return call([&] { return drop_stream(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE; });
}

CUresult cuStreamSynchronize(CUstream handle) {
    return call([&] {
        Stream &on = find_stream(handle, "cuStreamSynchronize");
        if (on.capture) refuse_unsupported(on);
        count("wait", "stream");
        return run(on);
    });
}

CUresult cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
    return call([&] {
        Stream &on = stream(handle, "cuStreamWaitEvent");
        if (on.capture && of(event).stream != &on) refuse(on, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
        Stream *before = of(event).stream;
        const uint64_t at = of(event).at;
        if (before && before != &on) enqueue(on, "wait for an event", {}, [=] { run(*before, at); });
        return CUDA_SUCCESS;
    });
}

CUresult cuEventCreate(CUevent *made, unsigned flags) {
    return call([&] {
        if (!current()) return CUDA_ERROR_INVALID_CONTEXT;
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
        event.captured = on.capture != nullptr;
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
        if (event.captured) return CUDA_ERROR_CAPTURED_EVENT;
        count("wait", "event");
        return event.stream ? run(*event.stream, event.at) : CUDA_SUCCESS;
    });
}

CUresult cuEventQuery(CUevent handle) {
    return call([&] {
        Event &event = of(handle);
        refuse_in_capture();
        if (event.captured) return CUDA_ERROR_CAPTURED_EVENT;
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
