// Captures and graphs: recording, instantiation, launches.
#include "graphs.h"

using namespace stand_in;

namespace {

// The stream that this thread captures.
thread_local Stream *captured = nullptr;

struct Graph {
    std::shared_ptr<Capture> content;
    bool instantiated = false;
};

// A graph that can be launched.
struct Executable {
    Graph *graph = nullptr; // none once the graph was destroyed
    std::shared_ptr<Capture> content;
    Device *owner = nullptr;
    bool frees_on_launch = false;
    bool launched = false;
};

std::set<Graph *> graphs;
std::set<Executable *> executables;

Graph *of(CUgraph handle) {
    Graph *graph = reinterpret_cast<Graph *>(handle);
    return graphs.count(graph) ? graph : nullptr;
}

Executable *of(CUgraphExec handle) {
    Executable *executable = reinterpret_cast<Executable *>(handle);
    return executables.count(executable) ? executable : nullptr;
}

// Runs the nodes in the order in which they were recorded.
void run_nodes(const Capture &content) {
    for (size_t i = 0; i < content.nodes.size(); ++i) {
        try {
            content.nodes[i].run();
        } catch (const Fault &problem) {
            throw Fault("node " + std::to_string(i) + ", " + content.nodes[i].name + ": " + problem.what());
        }
    }
}

bool forbids(const Capture &capture) {
    switch (capture.mode) {
    case CU_STREAM_CAPTURE_MODE_GLOBAL: return true;
    case CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: return capture.thread == std::this_thread::get_id();
    default: return false;
    }
}

} // namespace

namespace stand_in {

bool recorded_here() { return captured != nullptr; }

void refuse(Stream &stream, CUresult error) {
    stream.capture->invalid = true;
    throw Refusal{error};
}
void refuse_unsupported(Stream &stream) { refuse(stream, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED); }
void refuse_pageable(Stream &stream) { refuse_unsupported(stream); }

void refuse_in_capture() {
    for (Stream *each : streams())
        if (each->capture && forbids(*each->capture)) refuse_unsupported(*each);
}

void refuse_in_capture_of(Device &device) {
    for (Stream *each : streams())
        if (each->capture && each->owner == &device) refuse_unsupported(*each);
}

void check_capture(Stream &stream) {
    if (Capture *capture = stream.capture.get()) {
        if (capture->invalid) throw Refusal{CUDA_ERROR_STREAM_CAPTURE_INVALIDATED};
        if (++capture->calls == settings().capture_breaks) refuse_unsupported(stream);
        return;
    }
    if (!stream.own) return;
    for (Stream *each : streams())
        if (each->capture && each->blocking && each->owner == stream.owner) refuse(*each, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
}

void record(Stream &stream, Work work) { stream.capture->nodes.push_back(std::move(work)); }

CUresult record_allocation(Stream &stream, uint64_t bytes, CUdeviceptr *address) {
    if (bytes == 0) return CUDA_ERROR_INVALID_VALUE;
    Capture &capture = *stream.capture;
    auto memory = allocate_for_graph(*stream.owner, bytes);
    capture.allocations.push_back(memory);
    capture.held += rounded(bytes);
    capture.most = std::max(capture.most, capture.held);
    record(stream, {"allocation", {}, [memory] { memory->map(); }});
    *address = memory->address;
    return CUDA_SUCCESS;
}

CUresult record_free(Stream &stream, CUdeviceptr address) {
    Capture &capture = *stream.capture;
    const Place place = find(address, 0, "cuMemFreeAsync");
    bool own = false;
    for (const auto &each : capture.allocations) own = own || each == place.memory;
    if (!own) throw Fault("cuMemFreeAsync: the memory at " + hex(address) + " was not allocated in the capture");
    auto memory = retire(address, "cuMemFreeAsync");
    capture.held -= rounded(memory->bytes);
    record(stream, {"free", {}, [memory] { memory->release(); }});
    return CUDA_SUCCESS;
}

} // namespace stand_in

extern "C" {

CUresult cuStreamBeginCapture_v2(CUstream handle, CUstreamCaptureMode mode) {
    return call([&] {
        Stream &on = find_stream(handle, "cuStreamBeginCapture");
        if (on.own) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
        if (on.capture || captured) return CUDA_ERROR_ILLEGAL_STATE;
        count("graph", "captured");
        on.capture = std::make_shared<Capture>();
        on.capture->mode = mode;
        on.capture->thread = std::this_thread::get_id();
        captured = &on;
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamEndCapture(CUstream handle, CUgraph *made) {
    return call([&] {
        Stream &on = find_stream(handle, "cuStreamEndCapture");
        *made = nullptr;
        if (!on.capture) return CUDA_ERROR_ILLEGAL_STATE;
        if (captured != &on) return CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD;
        const auto content = std::move(on.capture);
        on.capture = nullptr;
        captured = nullptr;
        if (content->invalid) {
            // Nobody may name what it allocated.
            for (const auto &memory : content->allocations) memory->freed = true;
            return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        }
        Graph *graph = new Graph{content};
        graphs.insert(graph);
        *made = reinterpret_cast<CUgraph>(graph);
        return CUDA_SUCCESS;
    });
}

CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
    return call([&] {
        const Stream &on = find_stream(handle, "cuStreamIsCapturing");
        *status = !on.capture           ? CU_STREAM_CAPTURE_STATUS_NONE
                  : on.capture->invalid ? CU_STREAM_CAPTURE_STATUS_INVALIDATED
                                        : CU_STREAM_CAPTURE_STATUS_ACTIVE;
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *made, CUgraph handle, unsigned long long flags) {
    return call([&] {
        Graph *graph = of(handle);
        if (!graph) return CUDA_ERROR_INVALID_VALUE;
        if (!current()) return CUDA_ERROR_INVALID_CONTEXT;
        if (flags & ~(unsigned long long)CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH)
            throw Fault("cuGraphInstantiate: flags " + std::to_string(flags) + " are not in the stand-in");
        // "Graphs with allocation nodes can be instantiated only once at a time."
        if (graph->instantiated && !graph->content->allocations.empty()) return CUDA_ERROR_NOT_SUPPORTED;
        graph->instantiated = true;
        count("graph", "instantiated");
        auto *executable = new Executable{graph, graph->content, current(), flags != 0};
        executables.insert(executable);
        *made = reinterpret_cast<CUgraphExec>(executable);
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphLaunch(CUgraphExec handle, CUstream on_handle) {
    return call([&] {
        Executable *executable = of(handle);
        if (!executable) throw Fault("cuGraphLaunch: no graph, or one that was destroyed");
        Stream &on = stream(on_handle, "cuGraphLaunch");
        if (on.capture) throw Fault("cuGraphLaunch: a graph in a graph is not in the stand-in");
        const auto content = executable->content;
        // What the last launch left allocated would be allocated again.
        if (content->held && executable->launched && !executable->frees_on_launch) return CUDA_ERROR_INVALID_VALUE;
        Device &owner = *on.owner;
        const uint64_t more = content->most - std::min(content->most, owner.of_graphs);
        if (!owner.fits(more)) return CUDA_ERROR_OUT_OF_MEMORY;
        owner.of_graphs += more;
        executable->launched = true;
        count("graph", "launched");
        enqueue(on, "graph", {}, [content] {
            for (const auto &memory : content->allocations)
                if (memory->data) memory->release();
            run_nodes(*content);
        });
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphUpload(CUgraphExec handle, CUstream) {
    return call([&] { return of(handle) ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE; });
}

CUresult cuGraphExecDestroy(CUgraphExec handle) {
    return call([&] {
        Executable *executable = of(handle);
        if (!executable) throw Fault("cuGraphExecDestroy: no graph, or one that was destroyed");
        if (executable->graph) executable->graph->instantiated = false;
        count("graph", "destroyed");
        // Launches that have not run keep what they need.
        executables.erase(executable);
        delete executable;
        return CUDA_SUCCESS;
    });
}

CUresult cuGraphDestroy(CUgraph handle) {
    return call([&] {
        Graph *graph = of(handle);
        if (!graph) throw Fault("cuGraphDestroy: no graph, or one that was destroyed");
        for (Executable *each : executables)
            if (each->graph == graph) each->graph = nullptr;
        graphs.erase(graph);
        delete graph;
        return CUDA_SUCCESS;
    });
}

CUresult cuDeviceGraphMemTrim(CUdevice ordinal) {
    return call([&] {
        if (ordinal < 0 || ordinal >= settings().devices) return CUDA_ERROR_INVALID_DEVICE;
        Device &owner = device(ordinal);
        // The memory of graphs that are still to run stays.
        for (const Stream *each : streams())
            if (each->owner == &owner && !each->work.empty()) return CUDA_SUCCESS;
        owner.of_graphs = 0;
        return CUDA_SUCCESS;
    });
}

} // extern "C"
