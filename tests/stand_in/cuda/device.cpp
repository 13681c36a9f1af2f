// Settings, faults, the count of calls; memory, streams.
#include "device.h"
#include "graphs.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <sys/mman.h>
#include <unistd.h>

namespace stand_in {

namespace {

// Addresses that nothing is mapped at: 4 TiB.
constexpr uint64_t ADDRESS_BYTES = uint64_t(1) << 42, ALIGNMENT = 512;

struct Count {
    uint64_t calls = 0, bytes = 0;
};

struct State {
    std::vector<Device> devices;
    std::map<CUdeviceptr, std::shared_ptr<Allocation>> memory; // freed allocations too
    std::map<uintptr_t, std::shared_ptr<HostMemory>> pinned;
    std::set<Stream *> streams;
    std::map<Device *, Stream *> own_streams;
    std::map<std::string, Count> counts;
    CUdeviceptr next = 0, end = 0;
    std::multimap<uint64_t, CUdeviceptr> again; // free addresses of memory that never existed (dry), by bytes
    bool faulted = false;

    State() : devices(settings().devices) {
        for (size_t i = 0; i < devices.size(); ++i) devices[i].ordinal = int(i);
        void *range = mmap(nullptr, ADDRESS_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (range == MAP_FAILED) {
            perror("stand-in CUDA: no range of addresses");
            _exit(FAULT_EXIT);
        }
        next = reinterpret_cast<uintptr_t>(range) + ALIGNMENT;
        end = reinterpret_cast<uintptr_t>(range) + ADDRESS_BYTES;
        atexit(finish);
    }
    static void finish();
};

// Never destroyed: the program's own destructors call the driver after main.
State &state() {
    static State *all = new State();
    return *all;
}

void write_trace(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) {
        perror(path);
        return;
    }
    for (const auto &[name, count] : state().counts)
        fprintf(file, "%s\t%llu\t%llu\n", name.c_str(), (unsigned long long)count.calls, (unsigned long long)count.bytes);
    fclose(file);
}

void State::finish() {
    if (const char *path = getenv("GNEISS_CUDA_TRACE")) write_trace(path);
    if (state().faulted) {
        fprintf(stderr, "stand-in CUDA: the process ends with %d because of the faults above\n", FAULT_EXIT);
        fflush(nullptr);
        _exit(FAULT_EXIT);
    }
}

bool set(Settings &all, const std::string &name, const std::string &value) {
    const double number = atof(value.c_str());
    if (name == "devices") all.devices = int(number);
    else if (name == "memory") all.memory = uint64_t(number);
    else if (name == "hidden") all.hidden = uint64_t(number);
    else if (name == "hidden_after") all.hidden_after = uint64_t(number);
    else if (name == "capability") all.capability = int(number);
    else if (name == "driver") all.driver = int(number);
    else if (name == "pools") all.pools = number != 0;
    else if (name == "coherent") all.coherent = uint64_t(number);
    else if (name == "dry") all.dry = number != 0;
    else if (name == "algorithms") all.algorithms = number != 0;
    else if (name == "capture_breaks") all.capture_breaks = uint64_t(number);
    else if (name == "order") all.order = uint32_t(number);
    else if (name == "fatbins") all.fatbins = value;
    else return false;
    return true;
}

Settings read_settings() {
    Settings all;
    const char *given = getenv("GNEISS_STAND_IN");
    std::string rest = given ? given : "";
    while (!rest.empty()) {
        const size_t comma = rest.find(','), equals = rest.find('=');
        const std::string part = rest.substr(0, comma);
        if (equals >= part.size() || !set(all, part.substr(0, equals), part.substr(equals + 1))) {
            fprintf(stderr, "stand-in CUDA: GNEISS_STAND_IN: no setting %s\n", part.c_str());
            _exit(FAULT_EXIT);
        }
        rest = comma == std::string::npos ? "" : rest.substr(comma + 1);
    }
    return all;
}

} // namespace

const Settings &settings() {
    static const Settings all = read_settings();
    return all;
}

CUresult fault(const std::string &what) {
    fprintf(stderr, "stand-in CUDA: fault: %s\n", what.c_str());
    state().faulted = true;
    return CUDA_ERROR_ILLEGAL_ADDRESS;
}

std::recursive_mutex &lock() {
    static std::recursive_mutex *all = new std::recursive_mutex();
    return *all;
}

void count(const std::string &kind, const std::string &name, uint64_t bytes) {
    Count &entry = state().counts[(recorded_here() ? "captured " : "") + kind + "\t" + name];
    entry.calls += 1;
    entry.bytes += bytes;
}

std::string hex(uint64_t value) {
    char text[32];
    snprintf(text, sizeof text, "0x%llx", (unsigned long long)value);
    return text;
}

Device &device(int ordinal) { return state().devices.at(ordinal); }

Device *&current() {
    static thread_local Device *bound = nullptr;
    return bound;
}

void Allocation::map() {
    gone = false;
    if (!real) return;
    void *fresh = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (fresh == MAP_FAILED) throw Fault("the host has no memory for " + std::to_string(bytes) + " bytes of the device");
    data = static_cast<unsigned char *>(fresh);
    // A dry run computes nothing, and a loss of NaN would end it.
    if (!settings().dry) memset(data, 0xff, bytes);
}

void Allocation::release() {
    if (data) munmap(data, bytes);
    else if (!of_graph) state().again.emplace(bytes, address);
    data = nullptr;
    gone = true;
}

uint64_t rounded(uint64_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

bool Device::fits(uint64_t bytes) const {
    const uint64_t hidden = allocations < settings().hidden_after ? 0 : settings().hidden;
    return taken() + bytes <= settings().memory - hidden;
}

unsigned char *Place::data() const {
    if (memory->gone) throw Fault("work touches memory at " + hex(memory->address) + " after its freeing has run");
    return memory->data + offset;
}

namespace {

// An allocation with an address and without bytes.
std::shared_ptr<Allocation> place_for(Device &device, uint64_t bytes) {
    auto made = std::make_shared<Allocation>();
    if (const auto found = state().again.find(bytes); found != state().again.end()) {
        made->address = found->second;
        state().again.erase(found);
    } else {
        made->address = state().next;
        state().next += rounded(bytes) + ALIGNMENT;
    }
    if (state().next > state().end) throw Fault("the stand-in has no addresses left");
    made->bytes = bytes;
    made->owner = &device;
    made->real = !settings().dry || bytes <= DRY_BYTES;
    state().memory[made->address] = made;
    return made;
}

} // namespace

CUresult allocate(Device &device, uint64_t bytes, bool from_pool, CUdeviceptr *address) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    const uint64_t taken = rounded(bytes), kept = from_pool ? device.reserved - device.pooled : 0;
    const bool fits = device.fits(std::max(kept, taken) - kept);
    device.allocations += 1;
    if (!fits) return CUDA_ERROR_OUT_OF_MEMORY;
    auto made = place_for(device, bytes);
    made->from_pool = from_pool;
    made->map();
    device.used += taken;
    if (from_pool) {
        device.pooled += taken;
        device.reserved = std::max(device.reserved, device.pooled);
        device.most_pooled = std::max(device.most_pooled, device.pooled);
        device.most_reserved = std::max(device.most_reserved, device.reserved);
    }
    *address = made->address;
    return CUDA_SUCCESS;
}

std::shared_ptr<Allocation> allocate_for_graph(Device &device, uint64_t bytes) {
    auto made = place_for(device, bytes);
    made->of_graph = true;
    return made;
}

Place find(CUdeviceptr address, uint64_t bytes, const std::string &who) {
    auto after = state().memory.upper_bound(address);
    if (after == state().memory.begin()) throw Fault(who + ": " + hex(address) + " is no address of the device");
    const std::shared_ptr<Allocation> &memory = std::prev(after)->second;
    const uint64_t offset = address - memory->address;
    if (offset >= memory->bytes)
        throw Fault(who + ": " + hex(address) + " is in no allocation, the one before it ends at byte " +
                    std::to_string(memory->bytes) + ", found byte " + std::to_string(offset));
    if (memory->freed) throw Fault(who + ": " + hex(address) + " is in memory that was freed");
    if (memory->of_graph && !recorded_here()) throw Fault(who + ": " + hex(address) + " is in a graph's memory, which is there while the graph runs");
    if (current() && memory->owner != current())
        throw Fault(who + ": " + hex(address) + " is memory of device " + std::to_string(memory->owner->ordinal) +
                    ", the current device is " + std::to_string(current()->ordinal));
    if (bytes > memory->bytes - offset)
        throw Fault(who + ": expected " + std::to_string(bytes) + " bytes at " + hex(address) + ", the allocation has " +
                    std::to_string(memory->bytes - offset) + " there");
    return {memory, offset};
}

std::shared_ptr<Allocation> retire(CUdeviceptr address, const std::string &who) {
    const Place place = find(address, 0, who);
    Allocation &memory = *place.memory;
    if (place.offset) throw Fault(who + ": " + hex(address) + " is not where the allocation begins");
    memory.freed = true;
    if (memory.of_graph) return place.memory;
    memory.owner->used -= rounded(memory.bytes);
    if (memory.from_pool) memory.owner->pooled -= rounded(memory.bytes);
    return place.memory;
}

std::map<uintptr_t, std::shared_ptr<HostMemory>> &pinned() { return state().pinned; }

std::shared_ptr<HostMemory> pinned_around(const void *p) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(p);
    auto after = state().pinned.upper_bound(at);
    if (after == state().pinned.begin()) return nullptr;
    const auto &memory = std::prev(after)->second;
    return at < std::prev(after)->first + memory->bytes ? memory : nullptr;
}

Stream *make_stream(Device &device) {
    Stream *made = new Stream();
    made->owner = &device;
    state().streams.insert(made);
    return made;
}

bool drop_stream(CUstream handle) {
    Stream *dropped = reinterpret_cast<Stream *>(handle);
    if (!state().streams.erase(dropped)) return false;
    run(*dropped);
    return true;
}

std::set<Stream *> &streams() { return state().streams; }

Stream &stream(CUstream handle, const std::string &who) {
    Stream &found = find_stream(handle, who);
    check_capture(found);
    return found;
}

Stream &find_stream(CUstream handle, const std::string &who) {
    if (!current()) throw Fault(who + ": no context is bound to this thread");
    const uintptr_t number = reinterpret_cast<uintptr_t>(handle);
    if (number <= 2) {
        Stream *&own = state().own_streams[current()];
        if (!own) {
            own = make_stream(*current());
            own->own = true;
        }
        return *own;
    }
    Stream *found = reinterpret_cast<Stream *>(handle);
    if (!state().streams.count(found)) throw Fault(who + ": " + hex(number) + " is no stream");
    if (found->owner != current()) throw Fault(who + ": the stream is another context's than the current one");
    return *found;
}

void enqueue(Stream &stream, const std::string &name, std::vector<Place> places, std::function<void()> run) {
    bool exist = true;
    for (const Place &place : places) exist = exist && (!place.memory || place.exists());
    if (stream.capture) {
        record(stream, {name, std::move(places), exist ? std::move(run) : [] {}});
        return;
    }
    stream.issued += 1;
    for (const Place &place : places)
        if (place.memory) place.memory->pending += 1;
    stream.work.push_back({name, std::move(places), exist ? std::move(run) : [] {}});
}

CUresult run(Stream &stream, uint64_t until) {
    CUresult result = CUDA_SUCCESS;
    while (!stream.work.empty() && stream.done < until) {
        const Work work = std::move(stream.work.front());
        stream.work.pop_front();
        stream.done += 1;
        for (const Place &place : work.places)
            if (place.memory) place.memory->pending -= 1;
        try {
            work.run();
        } catch (const Fault &problem) {
            result = fault(work.name + ": " + problem.what());
        }
    }
    Device &owner = *stream.owner;
    if (stream.work.empty()) owner.give_back(owner.threshold);
    return result;
}

CUresult run_all(Device &device) {
    CUresult result = CUDA_SUCCESS;
    for (Stream *stream : state().streams)
        if (stream->owner == &device)
            if (const CUresult found = run(*stream); found != CUDA_SUCCESS) result = found;
    return result;
}

} // namespace stand_in
