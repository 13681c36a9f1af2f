// What the host gives for a launch.
#pragma once
#include <cstdint>

namespace emulated __attribute__((visibility("hidden"))) {

constexpr uint32_t MAX_BUFFERS = 16;

// src/ops/backend/gpu/emulated.rs has the same struct.
struct Launch {
    uint32_t grid[3];
    uint32_t threads;
    uint32_t shared_bytes;
    uint32_t order; // 0 ascending, 1 descending, else a seed: the order in which threads and blocks run
    uint32_t buffers;
    uint32_t reserved;
    void *pointers[MAX_BUFFERS];
    uint64_t bytes[MAX_BUFFERS];
    const void *parameters;
    uint64_t parameter_bytes;
};

} // namespace emulated
