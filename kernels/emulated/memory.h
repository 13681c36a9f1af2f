// Checked memory: every access is held against the buffer's bounds and against what other threads did to it.
#pragma once
#include "machine.h"
#include <type_traits>

namespace emulated __attribute__((visibility("hidden"))) {

// Who touched a granule of memory last, and when. `block` is 0 if no thread has. `other`: a reader before the last.
struct Stamp {
    uint32_t block, epoch, warp_epoch;
    uint32_t thread : 12, other : 12, marks : 8;
};
// Marks of a read: others of the warp read it in the same epoch; of the block; other blocks did.
constexpr uint32_t LANES = 1, WARPS = 2, BLOCKS = 4;
// Mark of a write: an asynchronous copy that has not landed.
constexpr uint32_t IN_FLIGHT = 1;

// Stamps of the last write and the last read. Of several readers only two are kept by name, but the marks keep what
// a later write needs: an access is ordered after another by a barrier of the block between them, or of the warp where
// both are of one warp, and a write that is not so ordered is found whoever the readers were.
struct Shadow {
    Stamp write, read;
};

struct Release {
    void operator()(void *p) const { free(p); }
};

// A buffer of the launch, or a block's shared memory.
struct Region {
    Machine *machine = nullptr;
    const void *key = nullptr; // of SHARED: its place in the source
    std::string name;
    unsigned char *base = nullptr;
    uint64_t bytes = 0;
    uint32_t unit = 1; // bytes a granule of the shadow
    bool shared = false, read = false, written = false;
    std::unique_ptr<unsigned char[]> owned;
    std::unique_ptr<Shadow[], Release> shadow; // none if nothing may be written

    void watch(uint32_t granule) {
        unit = granule;
        // Zeroed by the system at the first touch: large buffers cost what is used of them.
        shadow.reset(static_cast<Shadow *>(calloc(bytes / unit + 1, sizeof(Shadow))));
    }
    // Shared memory starts as NaN in every dtype.
    void poison() { memset(base, 0xff, bytes); }

    std::string element(uint64_t offset, uint64_t size) const {
        return name + "[" + std::to_string(static_cast<int64_t>(offset) / static_cast<int64_t>(size)) + "]";
    }
    void bounds(const char *what, int64_t index, uint64_t size) const {
        const int64_t count = bytes / size;
        if (index < 0 || index >= count)
            machine->fail(std::string(what) + " out of bounds, " + name + "[" + std::to_string(index) + "] of " +
                          std::to_string(count));
    }
    // An earlier access to the same place by thread `stamp.thread` of this block that nothing orders before this one.
    bool unordered(const Stamp &stamp) const {
        const uint32_t me = machine->running->place.thread;
        if (stamp.block != machine->serial || stamp.thread == me) return false;
        if (stamp.thread / WARP_SIZE == me / WARP_SIZE) return stamp.warp_epoch == machine->warp_epoch();
        return stamp.epoch == machine->epoch;
    }
    [[noreturn]] void race(const char *what, const Stamp &stamp, uint64_t offset, uint64_t size) const {
        const uint32_t named = stamp.thread == machine->running->place.thread ? stamp.other : stamp.thread;
        machine->fail(what + element(offset, size) + " with no barrier between, thread " + std::to_string(named) +
                      " and this one");
    }
    void check_write(uint64_t at, uint64_t offset, uint64_t size) const {
        const Stamp &write = shadow[at].write;
        if (!shared && write.block && write.block != machine->serial)
            machine->fail("two blocks touch " + element(offset, size) + ", another block wrote it");
        if (write.block == machine->serial && (write.marks & IN_FLIGHT))
            machine->fail(element(offset, size) + " is being copied to by thread " + std::to_string(write.thread) +
                          ", no cp_async_wait covers it yet");
        if (unordered(write)) race("race: a write to ", write, offset, size);
    }
    Stamp now() const {
        const uint32_t thread = machine->running->place.thread;
        return {machine->serial, machine->epoch, machine->warp_epoch(), thread, thread, 0};
    }

    void reads(int64_t index, uint64_t size) {
        bounds("read", index, size);
        read = true;
        if (!shadow) return;
        const uint64_t offset = index * size;
        for (uint64_t at = offset / unit; at < (offset + size) / unit; ++at) {
            check_write(at, offset, size);
            if (shared && shadow[at].write.block != machine->serial)
                machine->fail("shared memory read before it is written, " + element(offset, size));
            Stamp &last = shadow[at].read;
            Stamp next = now();
            if (last.block == next.block) {
                next.marks = last.marks & BLOCKS;
                if (last.epoch == next.epoch) {
                    if (last.thread / WARP_SIZE != next.thread / WARP_SIZE) next.marks |= WARPS;
                    else if (last.warp_epoch == next.warp_epoch && last.thread != next.thread) next.marks |= LANES;
                    else if (last.warp_epoch == next.warp_epoch) next.marks |= last.marks & LANES;
                    next.marks |= last.marks & WARPS;
                    next.other = last.thread != next.thread ? last.thread : last.other;
                }
            } else if (last.block) {
                next.marks = BLOCKS;
            }
            last = next;
        }
    }
    void writes(int64_t index, uint64_t size, uint32_t marks = 0) {
        bounds("write", index, size);
        written = true;
        const uint64_t offset = index * size;
        for (uint64_t at = offset / unit; at < (offset + size) / unit; ++at) {
            check_write(at, offset, size);
            const Stamp &seen = shadow[at].read;
            if (!shared && seen.block && (seen.block != machine->serial || (seen.marks & BLOCKS)))
                machine->fail("two blocks touch " + element(offset, size) + ", another block read it");
            if (seen.block == machine->serial) {
                const bool same_epoch = seen.epoch == machine->epoch;
                const bool same_warp = seen.thread / WARP_SIZE == machine->running->place.thread / WARP_SIZE;
                const bool lanes = (seen.marks & LANES) && same_warp && seen.warp_epoch == machine->warp_epoch();
                if (unordered(seen) || lanes || (same_epoch && (seen.marks & WARPS)))
                    race("race: a read and then a write of ", seen, offset, size);
            }
            shadow[at].write = now();
            shadow[at].write.marks = marks;
        }
    }
    // The asynchronous copy of 16 bytes to `offset` has landed.
    void lands(uint64_t offset, const unsigned char *from) {
        memcpy(base + offset, from, 16);
        for (uint64_t at = offset / unit; at < (offset + 16) / unit; ++at) shadow[at].write = now();
    }
};

// A reference that tells reads from writes.
template <typename T>
class Ref {
    Region *region;
    int64_t index;

  public:
    Ref(Region *region, int64_t index) : region(region), index(index) {}
    Ref(const Ref &) = default;
    operator T() const {
        region->reads(index, sizeof(T));
        T value;
        memcpy(&value, region->base + index * sizeof(T), sizeof(T));
        return value;
    }
    const Ref &operator=(const T &value) const {
        region->writes(index, sizeof(T));
        memcpy(region->base + index * sizeof(T), &value, sizeof(T));
        return *this;
    }
    const Ref &operator=(const Ref &other) const { return *this = T(other); }
    const Ref &operator+=(const T &value) const { return *this = T(*this) + value; }
    const Ref &operator-=(const T &value) const { return *this = T(*this) - value; }
    const Ref &operator*=(const T &value) const { return *this = T(*this) * value; }
    const Ref &operator/=(const T &value) const { return *this = T(*this) / value; }
};

// A pointer into a region. One to T is also one to const T, for helpers' template arguments too.
template <typename T>
class Checked;

template <typename T>
class Checked<const T> {
    static_assert(sizeof(T) >= 2, "shared memory is watched in units of two bytes");

  protected:
    Region *region = nullptr;
    int64_t at = 0;

  public:
    Checked() = default;
    Checked(Region *region, int64_t at) : region(region), at(at) {}
    Checked operator+(index_t n) const { return {region, at + static_cast<int64_t>(n)}; }
    T operator[](index_t i) const { return Ref<T>(region, at + static_cast<int64_t>(i)); }
    T operator*() const { return (*this)[0]; }

    // The region, and the bytes from its start, of element i, if its address is a multiple of `boundary`.
    Region *aligned(const char *what, index_t i, uint64_t &offset, uint64_t boundary) const {
        const int64_t index = at + static_cast<int64_t>(i);
        offset = static_cast<uint64_t>(index) * sizeof(T);
        if ((reinterpret_cast<uintptr_t>(region->base) + offset) % boundary)
            region->machine->fail(std::string(what) + " at an address that is no multiple of " +
                                  std::to_string(boundary) + ", " + region->name + "[" + std::to_string(index) + "]");
        return region;
    }
};

template <typename T>
class Checked : public Checked<const T> {
  public:
    Checked() = default;
    Checked(Region *region, int64_t at) : Checked<const T>(region, at) {}
    Checked operator+(index_t n) const { return {this->region, this->at + static_cast<int64_t>(n)}; }
    Ref<T> operator[](index_t i) const { return {this->region, this->at + static_cast<int64_t>(i)}; }
    Ref<T> operator*() const { return (*this)[0]; }
};

constexpr uint64_t MAX_STATIC_BYTES = 32 * 1024, MAX_SHARED_BYTES = 227 * 1024;

// Memory of a block, made when its first thread comes. `key` tells places of the source apart; the launch's own
// shared memory has none.
inline Region *shared_region(const void *key, const char *name, uint64_t bytes, uint32_t unit) {
    Machine &machine = *Machine::current();
    uint64_t all = 0;
    for (Region &region : *machine.shared) {
        if (region.key == key) return &region;
        all += region.key ? region.bytes : 0;
    }
    bytes = (bytes + 15) / 16 * 16;
    if (key && all + bytes > MAX_STATIC_BYTES)
        machine.fail("shared memory of " + std::to_string(all + bytes) + " bytes with " + name + ", at most " +
                     std::to_string(MAX_STATIC_BYTES));
    if (all + bytes + (key ? machine.shared_bytes : 0) > MAX_SHARED_BYTES)
        machine.fail(std::string("static and dynamic shared memory together are more than ") +
                     std::to_string(MAX_SHARED_BYTES) + " bytes with " + name);
    machine.shared->emplace_back();
    Region &region = machine.shared->back();
    region.machine = &machine;
    region.key = key;
    region.name = name;
    region.bytes = bytes;
    region.owned.reset(new unsigned char[bytes + 127]);
    region.base = region.owned.get() + (128 - reinterpret_cast<uintptr_t>(region.owned.get()) % 128) % 128;
    region.shared = true;
    region.watch(unit);
    region.poison();
    return &region;
}
template <typename T>
Checked<T> shared_memory(const void *key, const char *name, uint64_t count) {
    Region *region = shared_region(key, name, count * sizeof(T), sizeof(T));
    region->bytes = count * sizeof(T);
    return {region, 0};
}
// Two words over the launch's bytes may differ in type, so its granules are the smallest.
template <typename T>
Checked<T> dynamic_memory(const char *name) {
    return {shared_region(nullptr, name, Machine::current()->shared_bytes, 2), 0};
}

} // namespace emulated
