// A CUDA device over host memory, for the tests of a build with the feature `cuda` on a machine without a GPU.
//
// The library that these files make takes the place of libcuda, libcublas, libcublasLt, libcurand and libcudart. It
// keeps the calls' documented contract and checks it:
//
// * Device addresses are no host addresses: the host faults if it follows one. No address of memory that exists is used twice.
// * Fresh memory is filled with 0xff (NaN in every float type). Freed memory is gone.
// * Work of a stream (copies, fills, kernels, products, frees) runs when something waits for the stream, not before.
// * A stream that is captured records its work in a graph (graphs.h), which runs when it is launched. What a capture forbids fails.
// * A device has as much memory as GNEISS_STAND_IN says; allocations beyond it fail as a driver's do.
// * What a correct program never does is a *fault*: it is printed, the call fails, and the process ends with exit code 70
//   even if the program went on.
//
// GNEISS_STAND_IN: settings, `name=value` with commas between; see `Settings`. GNEISS_CUDA_TRACE: a file that gets the
// number of calls of each kind when the process ends.
#pragma once
#include <cuda.h>

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

namespace stand_in {

struct Settings {
    int devices = 1;
    uint64_t memory = uint64_t(24) << 30; // bytes of a device
    uint64_t hidden = 0; // bytes of it that others use, of which the driver says nothing
    uint64_t hidden_after = 0; // allocations before they do
    int capability = 90;                  // compute capability, without the dot
    int driver = 13000;                   // CUDA version of the driver: 1000 * major + 10 * minor
    bool pools = true;                    // whether the devices have memory pools
    // As on Grace Hopper: uploads of more bytes than this read pageable host memory when they run, not when they are called.
    // A driver takes up to 64 KB with the call (CUDA C++ Programming Guide, "Implicit synchronization" and "Concurrent
    // execution between host and device"); 0: it takes all.
    uint64_t coherent = 0;
    // gneiss's kernels do nothing, nor do products and copies that touch more than DRY_BYTES: such memory does not exist. For
    // counting the calls of models that are too large to compute here.
    bool dry = false;
    bool algorithms = true; // whether cuBLASLt has an algorithm for any product
    uint64_t capture_breaks = 0; // the call of a captured stream that fails, counted from 1 in each capture; 0: none
    uint32_t order = 0; // order of the emulator's threads, see kernels/emulated/host.h
    std::string fatbins; // folder of the fatbins that build.rs made
};
const Settings &settings();

constexpr uint64_t DRY_BYTES = 1 << 20;
constexpr int FAULT_EXIT = 70;

// Work that can't run: becomes a fault.
struct Fault : std::runtime_error {
    using std::runtime_error::runtime_error;
};
// Prints what is wrong, and makes the process end with FAULT_EXIT. Returns the error for the call to give back.
CUresult fault(const std::string &what);

// A call that the driver refuses with this error, in a place that has no result to return.
struct Refusal {
    CUresult error;
};

// All calls hold it.
std::recursive_mutex &lock();
#define LOCKED const std::lock_guard<std::recursive_mutex> guard(stand_in::lock())

// Counts a call for GNEISS_CUDA_TRACE; the kind of one that a capture records begins with "captured".
void count(const std::string &kind, const std::string &name, uint64_t bytes = 0);

struct Device {
    int ordinal = 0;
    bool retained = false;       // its primary context
    uint64_t allocations = 0;
    uint64_t used = 0;           // bytes of live allocations
    uint64_t reserved = 0;       // bytes that the pool holds, the used ones of the pool among them
    uint64_t pooled = 0;         // bytes of live allocations of the pool
    uint64_t threshold = 0;      // what the pool may keep at a synchronisation
    uint64_t of_graphs = 0;      // bytes that launched graphs have for their allocations
    uint64_t most_reserved = 0, most_pooled = 0;

    uint64_t taken() const { return used - pooled + reserved + of_graphs; }
    // Whether `bytes` more fit beside what is taken.
    bool fits(uint64_t bytes) const;
    void give_back(uint64_t keep) { reserved = std::max(pooled, std::min(reserved, keep)); }
};
Device &device(int ordinal);

// The context bound to this thread: a device's primary context. Null if none is.
Device *&current();

struct Allocation {
    CUdeviceptr address = 0;
    uint64_t bytes = 0;
    Device *owner = nullptr;
    bool from_pool = false;
    unsigned char *data = nullptr; // none for memory that does not exist (dry), or not yet (a graph's)
    bool real = true;              // whether it has bytes while it is there; not in a dry run if it is large
    bool of_graph = false;         // made by a capture: it is there from the graph's allocation to its freeing in each launch
    bool freed = false;            // a call has freed it; later calls must not name it
    bool gone = false;             // the freeing has run
    unsigned pending = 0;          // pieces of work that name it and have not run

    // Fresh bytes, filled with 0xff; throws Fault if the host has none.
    void map();
    // The freeing has run: the memory goes, its address stays taken.
    void release();
};

// A place in device memory, as a call names it.
struct Place {
    std::shared_ptr<Allocation> memory;
    uint64_t offset = 0;

    uint64_t left() const { return memory ? memory->bytes - offset : 0; }
    bool exists() const { return memory && memory->real; }
    // The bytes themselves; for work that runs. Throws Fault if the memory has been freed.
    unsigned char *data() const;
};

// Allocates; CUDA_ERROR_OUT_OF_MEMORY if the device's memory does not suffice.
CUresult allocate(Device &device, uint64_t bytes, bool from_pool, CUdeviceptr *address);
// Takes an address for an allocation of a graph.
std::shared_ptr<Allocation> allocate_for_graph(Device &device, uint64_t bytes);
uint64_t rounded(uint64_t bytes);
// The place at `address`, with at least `bytes` behind it; throws Fault, which says what `who` wanted.
Place find(CUdeviceptr address, uint64_t bytes, const std::string &who);
// Marks an allocation as freed, and gives its bytes back to the pool's or the device's account; throws Fault.
std::shared_ptr<Allocation> retire(CUdeviceptr address, const std::string &who);

// Page-locked host memory.
struct HostMemory {
    unsigned char *data;
    uint64_t bytes;
    bool freed = false;
};
std::map<uintptr_t, std::shared_ptr<HostMemory>> &pinned();
// The page-locked memory around `p`, if it is such.
std::shared_ptr<HostMemory> pinned_around(const void *p);

struct Work {
    std::string name;
    std::vector<Place> places;
    std::function<void()> run;
};
struct Capture;

struct Stream {
    Device *owner = nullptr;
    bool own = false;     // the context's own
    bool blocking = true; // whether it waits for the context's own stream
    uint64_t issued = 0, done = 0;
    std::deque<Work> work;
    std::shared_ptr<Capture> capture; // what it records; none outside of a capture
};
// The stream of a handle, in the current context; null and the per-thread stream are the context's own. Throws Fault, and Refusal
// if the stream records a capture that is invalid.
Stream &stream(CUstream handle, const std::string &who);
// The same, also if its capture is invalid.
Stream &find_stream(CUstream handle, const std::string &who);
std::set<Stream *> &streams();
Stream *make_stream(Device &device);
bool drop_stream(CUstream handle);

// Adds work that touches `places`, to the capture if there is one. It is left out (dry) if one of them does not exist.
void enqueue(Stream &stream, const std::string &name, std::vector<Place> places, std::function<void()> run);
// Runs a stream's work up to piece number `until`.
CUresult run(Stream &stream, uint64_t until = UINT64_MAX);
// Runs the work of all streams of a device.
CUresult run_all(Device &device);

struct Event {
    Device *owner = nullptr;
    Stream *stream = nullptr; // where it was recorded last; none before
    uint64_t at = 0;
    bool timed = false, ran = false;
    bool captured = false; // recorded last by a capture
    double seconds = 0;
};

// Runs the body of a call: a Fault or a Refusal that it throws is the call's error.
template <typename F>
CUresult call(F body) {
    LOCKED;
    try {
        return body();
    } catch (const Fault &problem) {
        return fault(problem.what());
    } catch (const Refusal &refused) {
        return refused.error;
    }
}

std::string hex(uint64_t value);

} // namespace stand_in
