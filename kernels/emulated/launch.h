// The kernels of the library by name, and `emulate`, which launches one.
#pragma once
#include "host.h"
#include "memory.h"
#include <map>
#include <utility>

namespace emulated __attribute__((visibility("hidden"))) {

// How a kernel takes an argument, by its type.
template <typename A>
struct Argument;
template <typename T>
struct Argument<Checked<T>> {
    static constexpr bool BUFFER = true, WRITABLE = !std::is_const<T>::value;
    static constexpr uint64_t BYTES = sizeof(T);
    static Checked<T> at(const Launch &, std::deque<Region> &buffers, size_t i) { return {&buffers[i], 0}; }
};
template <typename S>
struct Argument<const S &> {
    static constexpr bool BUFFER = false, WRITABLE = false;
    static constexpr uint64_t BYTES = sizeof(S);
    static const S &at(const Launch &launch, std::deque<Region> &, size_t) {
        return *static_cast<const S *>(launch.parameters);
    }
};
struct Shape {
    bool buffer, writable;
    uint64_t bytes;
};

struct Kernel {
    std::string file;
    uint32_t max_threads;
    std::string arguments; // the text of the kernel's arguments: IN(0, T, name), ...
    std::vector<Shape> shapes;
    std::function<void(const Launch &, std::deque<Region> &, const Place &)> call;
    uint32_t times; // how many kernels of the library have the name

    // Argument i's index and name as the source has them.
    void source(size_t i, std::string &index, std::string &name) const {
        size_t from = 0;
        for (size_t n = 0; n < i; ++n) from = arguments.find(')', from) + 1;
        const size_t open = arguments.find('(', from), close = arguments.find(')', from);
        const size_t first = arguments.find(',', open), last = arguments.rfind(',', close);
        auto trimmed = [&](size_t a, size_t b) {
            const std::string part = arguments.substr(a, b - a);
            const size_t start = part.find_first_not_of(" ,"), end = part.find_last_not_of(" ,");
            return start == std::string::npos ? part : part.substr(start, end - start + 1);
        };
        index = trimmed(open + 1, first);
        name = trimmed(last + 1, close);
    }
};

inline std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

template <typename... A, size_t... i>
static void call(void (*kernel)(const Place &, A...), const Launch &launch, std::deque<Region> &buffers,
                 const Place &place, std::index_sequence<i...>) {
    kernel(place, Argument<A>::at(launch, buffers, i)...);
}

// Enters a kernel; at the library's start, once for each KERNEL.
template <typename... A>
static bool enlist(const char *name, const char *file, uint32_t max_threads, const char *arguments,
                   void (*kernel)(const Place &, A...)) {
    const uint32_t times = kernels()[name].times + 1;
    kernels()[name] = {file,
                       max_threads,
                       arguments,
                       {{Argument<A>::BUFFER, Argument<A>::WRITABLE, Argument<A>::BYTES}...},
                       [kernel](const Launch &launch, std::deque<Region> &buffers, const Place &place) {
                           call(kernel, launch, buffers, place, std::index_sequence_for<A...>());
                       },
                       times};
    return true;
}

// What is wrong with the launch, before it runs; makes its buffers.
inline std::string prepare(const Kernel &kernel, const Launch &launch, Machine &machine, std::deque<Region> &buffers) {
    const uint32_t *grid = launch.grid;
    if (kernel.times != 1) return "the library has several kernels of this name";
    if (!launch.threads || launch.threads % WARP_SIZE || launch.threads > kernel.max_threads ||
        kernel.max_threads > MAX_BLOCK)
        return std::to_string(launch.threads) + " threads a block, expected a multiple of 32 up to " +
               std::to_string(kernel.max_threads);
    if (!grid[0] || !grid[1] || !grid[2] || grid[1] > 65535 || grid[2] > 65535 ||
        static_cast<unsigned __int128>(grid[0]) * grid[1] * grid[2] > 0x7fffffffu)
        return "a grid of [" + std::to_string(grid[0]) + ", " + std::to_string(grid[1]) + ", " +
               std::to_string(grid[2]) + "], expected 1 to 65535 in y and z, and fewer than 2^31 blocks";
    if (launch.shared_bytes > MAX_SHARED_BYTES)
        return std::to_string(launch.shared_bytes) + " bytes of shared memory, at most " +
               std::to_string(MAX_SHARED_BYTES);
    size_t expected = 0;
    for (const Shape &shape : kernel.shapes) expected += shape.buffer;
    if (launch.buffers != expected || expected > MAX_BUFFERS)
        return std::to_string(launch.buffers) + " buffers, expected " + std::to_string(expected);
    for (size_t i = 0; i < kernel.shapes.size(); ++i) {
        const Shape &shape = kernel.shapes[i];
        std::string index, name;
        kernel.source(i, index, name);
        if (index != std::to_string(i))
            return "argument " + name + " has index " + index + ", expected " + std::to_string(i);
        if (!shape.buffer) {
            if (i + 1 != kernel.shapes.size()) return "PARAMETERS is not the last argument";
            if (launch.parameter_bytes != shape.bytes)
                return std::to_string(launch.parameter_bytes) + " bytes of parameters, expected " +
                       std::to_string(shape.bytes);
            continue;
        }
        if (launch.bytes[i] % shape.bytes || reinterpret_cast<uintptr_t>(launch.pointers[i]) % shape.bytes)
            return "buffer " + name + ": " + std::to_string(launch.bytes[i]) +
                   " bytes, or its address, are no multiple of " + std::to_string(shape.bytes);
        buffers.emplace_back();
        Region &region = buffers.back();
        region.machine = &machine;
        region.name = name;
        region.base = static_cast<unsigned char *>(launch.pointers[i]);
        region.bytes = launch.bytes[i];
        if (shape.writable) region.watch(shape.bytes);
    }
    return {};
}

// Arguments are __restrict__ on CUDA: what is written must not be reached through another one.
inline std::string overlap(const std::deque<Region> &buffers) {
    for (const Region &a : buffers)
        for (const Region &b : buffers)
            if (&a != &b && a.written && (b.read || b.written) && a.base < b.base + b.bytes &&
                b.base < a.base + a.bytes)
                return "buffers " + a.name + " and " + b.name + " overlap, both are used and " + a.name + " is written";
    return {};
}

// Runs a launch; what went wrong, or nothing.
inline std::string run(const char *name, const Launch &launch) {
    const auto found = kernels().find(name);
    if (found == kernels().end()) return "no kernel of this name in the library";
    const Kernel &kernel = found->second;
    Machine machine;
    std::deque<Region> buffers, shared;
    std::string fault = prepare(kernel, launch, machine, buffers);
    if (!fault.empty()) return fault;
    machine.kernel = name;
    machine.shared = &shared;
    machine.shared_bytes = launch.shared_bytes;
    Machine::current() = &machine;
    machine.run(
        launch.grid, launch.threads, launch.order,
        [&] {
            for (Region &region : shared) region.poison();
        },
        [&](const Place &place) { kernel.call(launch, buffers, place); });
    Machine::current() = nullptr;
    return machine.fault.empty() ? overlap(buffers) : machine.fault;
}

} // namespace emulated
