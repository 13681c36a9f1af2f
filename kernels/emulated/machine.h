// One launch: its blocks run one after another, the threads of a block as fibers that switch at barriers.
#pragma once
#include "fiber.h"
#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace emulated __attribute__((visibility("hidden"))) {

constexpr uint32_t WARP_SIZE = 32, MAX_BLOCK = 1024;

// A thread's indices.
struct Place {
    uint32_t thread, threads, block[3];
};

// A line of a kernel's source at which threads meet.
struct Meeting {
    const char *what;
    const char *file;
    uint32_t line;
    uint32_t detail; // a shuffle's mask
    bool of_block;

    bool same(const Meeting &other) const {
        return line == other.line && detail == other.detail && of_block == other.of_block &&
               strcmp(what, other.what) == 0 && strcmp(file, other.file) == 0;
    }
    std::string text() const { return std::string(what) + " (" + file + ":" + std::to_string(line) + ")"; }
};

struct Region;

// One 16-byte copy to shared memory that has not landed.
struct Copy {
    Region *to;
    uint64_t offset;
    unsigned char bytes[16];
};

enum class State { Ready, Waiting, Ended };

struct Fiber {
    Place place;
    State state;
    Meeting meeting;
    void *stack_pointer;
    std::vector<Copy> uncommitted;
    std::deque<std::vector<Copy>> groups;
};

// What the lanes of a warp hand each other. A lane is never two meetings ahead of another, so two sets do.
struct Warp {
    uint32_t epoch;
    unsigned char slots[2][WARP_SIZE][32];
    uint32_t calls[WARP_SIZE];
};

class Machine {
  public:
    const char *kernel = "";
    std::string fault;
    std::vector<Fiber> fibers;
    std::vector<Warp> warps;
    std::deque<Region> *shared = nullptr; // Places of SHARED, in the order of their first use.
    Fiber *running = nullptr;
    uint32_t epoch = 0;  // counts the barriers of the block
    uint32_t serial = 0; // counts the blocks from 1
    uint64_t shared_bytes = 0;

    // Runs `body` once for each thread of each block, `begin` before each block.
    void run(const uint32_t grid[3], uint32_t threads, uint32_t order, const std::function<void()> &begin,
             const std::function<void(const Place &)> &body);

    // Ends the launch with a message; called in a fiber, which never goes on.
    [[noreturn]] void fail(const std::string &what) {
        const Place &at = running->place;
        fault = what + ": block (" + std::to_string(at.block[0]) + ", " + std::to_string(at.block[1]) + ", " +
                std::to_string(at.block[2]) + "), thread " + std::to_string(at.thread);
        leave();
        abort();
    }
    // Waits until all threads of the block, or lanes of the warp, are at `meeting`.
    void meet(const Meeting &meeting) {
        running->meeting = meeting;
        running->state = State::Waiting;
        leave();
    }
    // Hands `mine` to the other lanes of the warp and returns what each of them handed.
    const unsigned char (*exchange(const void *mine, size_t bytes, const Meeting &meeting))[32] {
        Warp &warp = warps[running->place.thread / WARP_SIZE];
        const uint32_t lane = running->place.thread % WARP_SIZE, set = warp.calls[lane]++ % 2;
        memcpy(warp.slots[set][lane], mine, bytes);
        meet(meeting);
        return warp.slots[set];
    }
    uint32_t warp_epoch() const { return warps[running->place.thread / WARP_SIZE].epoch; }
    static Machine *&current() {
        static thread_local Machine *machine = nullptr;
        return machine;
    }

  private:
    std::unique_ptr<unsigned char[]> stacks;
    void *scheduler = nullptr;
    const std::function<void(const Place &)> *body = nullptr;
    uint32_t random = 0;

    void leave() { emulated_switch(&running->stack_pointer, scheduler); }
    static void entry() {
        Machine &machine = *current();
        (*machine.body)(machine.running->place);
        machine.running->state = State::Ended;
        machine.leave();
        abort();
    }
    void arrange(std::vector<uint32_t> &indices, uint32_t order) {
        if (order < 2) return;
        for (size_t i = indices.size(); i > 1; --i) {
            random = random * 1664525u + 1013904223u;
            std::swap(indices[i - 1], indices[(random >> 8) % i]);
        }
    }
    static std::vector<uint32_t> numbers(uint32_t count, uint32_t order) {
        std::vector<uint32_t> all(count);
        for (uint32_t i = 0; i < count; ++i) all[i] = order == 1 ? count - 1 - i : i;
        return all;
    }
    bool run_block(uint32_t order, unsigned char *stack);
    void release();
    void stuck();
    std::string doing(const Fiber &fiber) const {
        return "thread " + std::to_string(fiber.place.thread) +
               (fiber.state == State::Ended ? " has ended" : " waits at " + fiber.meeting.text());
    }
    std::string of_block() const {
        const uint32_t *b = fibers[0].place.block;
        return "block (" + std::to_string(b[0]) + ", " + std::to_string(b[1]) + ", " + std::to_string(b[2]) + "): ";
    }
};

inline void Machine::run(const uint32_t grid[3], uint32_t threads, uint32_t order,
                         const std::function<void()> &begin, const std::function<void(const Place &)> &of_thread) {
    body = &of_thread;
    random = order;
    stacks.reset(new unsigned char[STACK_BYTES * threads + 15]);
    unsigned char *stack = stacks.get() + (16 - reinterpret_cast<uintptr_t>(stacks.get()) % 16) % 16;
    fibers.resize(threads);
    warps.resize(threads / WARP_SIZE);
    std::vector<uint32_t> blocks = numbers(grid[0] * grid[1] * grid[2], order);
    arrange(blocks, order);
    for (uint32_t block : blocks) {
        for (uint32_t thread = 0; thread < threads; ++thread) {
            Fiber &fiber = fibers[thread];
            fiber.place = {thread, threads, {block % grid[0], block / grid[0] % grid[1], block / grid[0] / grid[1]}};
            fiber.state = State::Ready;
            fiber.stack_pointer = fresh_stack(stack + thread * STACK_BYTES, entry);
            fiber.uncommitted.clear();
            fiber.groups.clear();
        }
        for (Warp &warp : warps) warp = Warp();
        epoch = 0;
        serial += 1;
        begin();
        if (!run_block(order, stack)) return;
    }
}

// Runs what can run, in rounds, until all threads have ended; false if there was a fault.
inline bool Machine::run_block(uint32_t order, unsigned char *stack) {
    std::vector<uint32_t> turns = numbers(fibers.size(), order);
    for (;;) {
        arrange(turns, order);
        bool ran = false, ended = true;
        for (uint32_t turn : turns) {
            Fiber &fiber = fibers[turn];
            if (fiber.state == State::Ready) {
                running = &fiber;
                emulated_switch(&scheduler, fiber.stack_pointer);
                if (overflown(stack + turn * STACK_BYTES)) {
                    fprintf(stderr, "%s: a thread needs more than %zu bytes of stack\n", kernel, STACK_BYTES);
                    abort(); // Another thread's stack is overwritten.
                }
                if (!fault.empty()) return false;
                ran = true;
            }
            ended = ended && fiber.state == State::Ended;
        }
        if (ended) return true;
        if (!ran) stuck();
        if (fault.empty()) release();
        if (!fault.empty()) return false;
    }
}

// Lets go the warps whose lanes have all come, and the block if all its threads have.
inline void Machine::release() {
    bool all = true;
    for (const Fiber &fiber : fibers) all = all && fiber.state == State::Waiting && fiber.meeting.of_block;
    for (size_t first = 0; first < fibers.size(); first += all ? fibers.size() : WARP_SIZE) {
        const size_t end = all ? fibers.size() : first + WARP_SIZE;
        bool come = true;
        for (size_t i = first; i < end; ++i)
            come = come && fibers[i].state == State::Waiting && fibers[i].meeting.of_block == all;
        if (!come) continue;
        for (size_t i = first; i < end; ++i)
            if (!fibers[i].meeting.same(fibers[first].meeting)) {
                fault = std::string(all ? "barrier" : "warp function") + " that not all threads come to: " +
                        of_block() + doing(fibers[first]) + ", " + doing(fibers[i]);
                return;
            }
        const bool orders = all || strcmp(fibers[first].meeting.what, "WARP_BARRIER") == 0;
        for (size_t i = first; i < end; ++i) {
            fibers[i].state = State::Ready;
            warps[i / WARP_SIZE].epoch += orders && i % WARP_SIZE == 0;
        }
        epoch += all;
    }
}

// No thread can go on: says which waits, and which does not come.
inline void Machine::stuck() {
    const Fiber *waits = nullptr, *other = nullptr;
    for (const Fiber &fiber : fibers)
        if (!waits && fiber.state == State::Waiting) waits = &fiber;
    for (const Fiber &fiber : fibers) {
        const bool near = waits->meeting.of_block || fiber.place.thread / WARP_SIZE == waits->place.thread / WARP_SIZE;
        const bool differs = fiber.state == State::Ended || !fiber.meeting.same(waits->meeting);
        if (!other && near && differs) other = &fiber;
    }
    fault = std::string(waits->meeting.of_block ? "barrier" : "warp function") + " that not all threads come to: " +
            of_block() + doing(*waits) + (other ? ", " + doing(*other) : std::string());
}

} // namespace emulated
