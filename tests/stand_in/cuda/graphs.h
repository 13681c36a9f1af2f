// Captures of streams, and the graphs that they make (CUDA driver API, "Stream Management" and "Graph Management"; CUDA C++
// Programming Guide, "Creating a graph using stream capture" and "Graph memory nodes").
//
// A captured stream records its work, which runs at each launch of the graph. A capture forbids what would have to wait for
// its stream or what might: the call fails, and the capture is invalid from then on. It has to be ended all the same.
#pragma once
#include "device.h"

#include <thread>

namespace stand_in {

// What a stream records.
struct Capture {
    CUstreamCaptureMode mode = CU_STREAM_CAPTURE_MODE_GLOBAL;
    std::thread::id thread;
    std::vector<Work> nodes;
    // Allocations among the nodes. Their memory is there from the allocation to its freeing in each launch.
    std::vector<std::shared_ptr<Allocation>> allocations;
    uint64_t held = 0, most = 0; // bytes of allocations that are not freed yet, and the most there were
    uint64_t calls = 0;
    bool invalid = false;
};

// Whether this thread is recording a capture.
bool recorded_here();
// Throws Refusal if the stream records a capture that is invalid, or becomes it now (Settings::capture_breaks); or if the stream is
// the context's own and one that waits for it is captured.
void check_capture(Stream &stream);
// Adds a node.
void record(Stream &stream, Work work);
CUresult record_allocation(Stream &stream, uint64_t bytes, CUdeviceptr *address);
// Throws Fault if the memory was not allocated in this capture.
CUresult record_free(Stream &stream, CUdeviceptr address);

// Makes the stream's capture invalid, and throws Refusal with this error.
[[noreturn]] void refuse(Stream &stream, CUresult error);
[[noreturn]] void refuse_unsupported(Stream &stream);
// For a copy from or to memory that is not page-locked, which waits for the stream or for the host.
[[noreturn]] void refuse_pageable(Stream &stream);
// For calls that may wait for a stream ("potentially unsafe" ones): throws Refusal if a capture forbids them on this thread.
void refuse_in_capture();
// For calls that wait for a device.
void refuse_in_capture_of(Device &device);

} // namespace stand_in
