// Modules: gneiss's fatbins and candle's PTX; their functions, and launches.
#pragma once
#include "device.h"

namespace stand_in {

// Limits of compute capability 9.0, bytes: shared memory of a block with and without asking.
constexpr int PLAIN_SHARED = 48 << 10, MAX_SHARED = 227 << 10;

struct Grid {
    unsigned blocks[3], threads[3];
    uint64_t all_threads() const {
        uint64_t all = 1;
        for (int i = 0; i < 3; ++i) all *= uint64_t(blocks[i]) * threads[i];
        return all;
    }
};

// An argument of a launch as its kernel sees it: the bytes that the driver copied, and what they point to.
struct Argument {
    std::vector<unsigned char> bytes;
    Place place; // of an address; no memory for null
};

// One of candle's kernels, written once more: the sizes of its parameters, and what it does.
struct CandleKernel {
    // Bytes of each parameter; 0 stands for an address of memory, -1 for one that may be null.
    std::vector<int> parameters;
    std::function<void(const std::string &name, const Grid &grid, std::vector<Argument> &arguments)> run;
};
// Null if there is none of the name.
const CandleKernel *candle_kernel(const std::string &name);

} // namespace stand_in
