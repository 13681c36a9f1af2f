// Loading of modules, and launches.
#include "modules.h"
#include "emulated/host.h"
#include "graphs.h"

#include <cstdio>
#include <cstring>
#include <dirent.h>
#include <dlfcn.h>
#include <fstream>
#include <regex>
#include <set>
#include <sstream>

using namespace stand_in;

namespace {

struct Function;

struct Module {
    Device *owner = nullptr;
    std::string file, element; // of a fatbin: kernels/FILE.cu and the dtype's name in the library of kernels
    std::map<std::string, std::vector<int>> entries; // of PTX: bytes of each parameter
    std::map<std::string, std::unique_ptr<Function>> functions;
};

struct Function {
    Module *module = nullptr;
    std::string name;
    int shared_limit = PLAIN_SHARED;
    const CandleKernel *candle = nullptr;
    uint32_t buffers = 0; // of a kernel of gneiss
    uint64_t parameter_bytes = 0;
};

// The kernels of gneiss for a dtype, compiled for the emulator; beside this library.
struct Kernels {
    int (*emulate)(const char *, const emulated::Launch *, char *, uint64_t);
    int (*arguments)(const char *, const char **file, uint32_t *buffers, uint64_t *parameter_bytes);
};

const Kernels &kernels(const std::string &element) {
    static std::map<std::string, Kernels> opened;
    if (const auto found = opened.find(element); found != opened.end()) return found->second;
    Dl_info here;
    dladdr(reinterpret_cast<void *>(&candle_kernel), &here);
    std::string path = here.dli_fname;
    path = path.substr(0, path.rfind('/') + 1) + "kernels_" + element + ".so";
    void *library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!library) throw Fault(dlerror());
    Kernels kernels;
    kernels.emulate = reinterpret_cast<decltype(kernels.emulate)>(dlsym(library, "emulate"));
    kernels.arguments = reinterpret_cast<decltype(kernels.arguments)>(dlsym(library, "emulated_arguments"));
    if (!kernels.emulate || !kernels.arguments) throw Fault(path + ": expected emulate and emulated_arguments");
    return opened[element] = kernels;
}

std::string contents(const std::string &path) {
    std::ifstream file(path, std::ios::binary);
    std::stringstream text;
    text << file.rdbuf();
    return text.str();
}

template <typename T>
T field(const void *image, size_t at) {
    T value;
    memcpy(&value, static_cast<const char *>(image) + at, sizeof value);
    return value;
}

// A fatbin: a header of 16 bytes (magic, version, size of the header, size of what follows), then entries, each with a
// header (kind at 0: 1 PTX, 2 machine code; its own size at 4, the padded size of its contents at 8, the target at 28).
constexpr uint32_t FATBIN = 0xBA55ED50;

bool runs_here(const char *image, uint64_t bytes) {
    const int capability = settings().capability;
    for (uint64_t at = 16; at + 32 <= bytes;) {
        const uint16_t kind = field<uint16_t>(image, at);
        const int target = field<int32_t>(image, at + 28);
        if (kind == 1 && target <= capability) return true;
        if (kind == 2 && target / 10 == capability / 10 && target <= capability) return true;
        at += field<uint32_t>(image, at + 4) + field<uint64_t>(image, at + 8);
    }
    return false;
}

CUresult load_fatbin(Module &module, const char *image) {
    const uint64_t bytes = field<uint16_t>(image, 6) + field<uint64_t>(image, 8);
    if (!runs_here(image, bytes)) return CUDA_ERROR_NO_BINARY_FOR_GPU;
    const std::string &folder = settings().fatbins;
    DIR *open = opendir(folder.c_str());
    if (!open) throw Fault("GNEISS_STAND_IN: fatbins: no folder '" + folder + "'");
    while (const dirent *entry = readdir(open)) {
        const std::string name = entry->d_name; // FILE_ELEMENT.fatbin
        const size_t dot = name.rfind(".fatbin"), line = name.rfind('_');
        if (dot == std::string::npos || line == std::string::npos) continue;
        const std::string text = contents(folder + "/" + name);
        // What the linker may have put behind the image is not compared.
        if (text.size() > bytes || memcmp(text.data(), image, text.size()) != 0) continue;
        module.file = name.substr(0, line);
        module.element = name.substr(line + 1, dot - line - 1);
    }
    closedir(open);
    if (module.file.empty()) throw Fault("cuModuleLoadData: no fatbin in " + folder + " has these contents");
    return CUDA_SUCCESS;
}

// The CUDA version, 1000 * major + 10 * minor, that reads PTX of version `major.minor` (PTX ISA, release history).
int driver_of_ptx(int major, int minor) {
    return major == 9 ? 13000 + 10 * minor : major == 8 ? (minor <= 5 ? 12000 : 12010) + 10 * minor : 11000 + 10 * minor;
}

int bytes_of(const std::string &type) {
    if (type.size() < 2) return 0;
    return std::stoi(type.substr(1)) / 8;
}

CUresult load_ptx(Module &module, const std::string &text) {
    std::smatch found;
    static const std::regex version("\\.version\\s+(\\d+)\\.(\\d+)"), target("\\.target\\s+sm_(\\d+)(a?)");
    if (!std::regex_search(text, found, version)) return CUDA_ERROR_INVALID_PTX;
    if (driver_of_ptx(std::stoi(found[1]), std::stoi(found[2])) > settings().driver) return CUDA_ERROR_UNSUPPORTED_PTX_VERSION;
    if (!std::regex_search(text, found, target)) return CUDA_ERROR_INVALID_PTX;
    const int compiled = std::stoi(found[1]);
    if (compiled > settings().capability || (found[2].length() && compiled != settings().capability))
        return CUDA_ERROR_NO_BINARY_FOR_GPU;
    // .visible .entry NAME( .param .u64 .ptr .align 1 a, .param .align 2 .b8 b[2] )
    size_t at = 0;
    while ((at = text.find(".entry ", at)) != std::string::npos) {
        const size_t open = text.find('(', at), close = text.find(')', open);
        std::string name = text.substr(at + 7, open - at - 7);
        while (!name.empty() && isspace(name.back())) name.pop_back();
        std::vector<int> &sizes = module.entries[name];
        std::istringstream lines(text.substr(open + 1, close - open - 1));
        for (std::string line; std::getline(lines, line);) {
            std::istringstream words(line);
            int bytes = 0;
            for (std::string word; words >> word;) {
                if (word == ".param" || word == ".ptr" || word == ".global" || word == ".align") continue;
                if (word[0] == '.' && !bytes) bytes = bytes_of(word.substr(1));
                else if (const size_t bracket = word.find('['); bracket != std::string::npos)
                    bytes = std::stoi(word.substr(bracket + 1));
            }
            if (bytes) sizes.push_back(bytes);
        }
        at = close;
    }
    return CUDA_SUCCESS;
}

Module &of(CUmodule module) { return *reinterpret_cast<Module *>(module); }
Function &of(CUfunction function) { return *reinterpret_cast<Function *>(function); }

// Finds out what a function of PTX takes; it must be what the kernel here takes.
void open_candle(Function &function, const std::vector<int> &sizes) {
    function.candle = candle_kernel(function.name);
    if (!function.candle) return;
    const std::vector<int> &expected = function.candle->parameters;
    bool same = expected.size() == sizes.size();
    for (size_t i = 0; same && i < sizes.size(); ++i) same = sizes[i] == (expected[i] > 0 ? expected[i] : 8);
    if (same) return;
    std::string found;
    for (int size : sizes) found += " " + std::to_string(size);
    throw Fault("candle's " + function.name + " takes parameters of" + found + " bytes, not those of tests/stand_in/cuda/candle.cpp");
}

// The bytes of argument `i`; throws Fault if they can't be read.
Argument argument(void **given, size_t i, uint64_t bytes, const std::string &who) {
    Argument made;
    made.bytes.resize(bytes);
    if (!given[i]) throw Fault(who + ": argument " + std::to_string(i) + " is missing");
    memcpy(made.bytes.data(), given[i], bytes);
    return made;
}

Argument address(void **given, size_t i, bool may_be_null, const std::string &who) {
    Argument made = argument(given, i, 8, who);
    const CUdeviceptr value = field<CUdeviceptr>(made.bytes.data(), 0);
    if (!value && may_be_null) return made;
    made.place = find(value, 1, who + ": argument " + std::to_string(i));
    return made;
}

void check_grid(const Grid &grid, unsigned shared, const Function &function, CUresult &result) {
    const unsigned *b = grid.blocks, *t = grid.threads;
    const bool blocks = b[0] && b[1] && b[2] && b[0] <= 0x7fffffff && b[1] <= 65535 && b[2] <= 65535;
    const bool threads = t[0] && t[1] && t[2] && t[0] <= 1024 && t[1] <= 1024 && t[2] <= 64 &&
                         uint64_t(t[0]) * t[1] * t[2] <= 1024;
    const bool memory = int(shared) <= function.shared_limit;
    if (!blocks || !threads || !memory) result = CUDA_ERROR_INVALID_VALUE;
}

void launch_own(Stream &on, const Function &function, const Grid &grid, unsigned shared, void **given) {
    const std::string who = "kernels/" + function.module->file + ".cu: " + function.name;
    auto launch = std::make_shared<emulated::Launch>();
    std::vector<Place> places;
    for (uint32_t i = 0; i < function.buffers; ++i) places.push_back(address(given, i, false, who).place);
    auto parameters = std::make_shared<Argument>(argument(given, function.buffers, function.parameter_bytes, who));
    if (grid.threads[1] != 1 || grid.threads[2] != 1) throw Fault(who + ": blocks of more than one dimension");
    for (int i = 0; i < 3; ++i) launch->grid[i] = grid.blocks[i];
    launch->threads = grid.threads[0];
    launch->shared_bytes = shared;
    launch->order = settings().order;
    launch->buffers = function.buffers;
    launch->parameter_bytes = function.parameter_bytes;
    const Kernels &all = kernels(function.module->element);
    const std::string name = function.name;
    enqueue(on, who, places, [=, &all] {
        if (settings().dry) return;
        for (size_t i = 0; i < places.size(); ++i) {
            launch->pointers[i] = places[i].data();
            launch->bytes[i] = places[i].left();
        }
        launch->parameters = parameters->bytes.data();
        char message[2048];
        if (all.emulate(name.c_str(), launch.get(), message, sizeof message)) throw Fault(message);
    });
}

void launch_candle(Stream &on, const Function &function, const Grid &grid, void **given) {
    const std::string who = "candle's " + function.name;
    const CandleKernel &kernel = *function.candle;
    auto arguments = std::make_shared<std::vector<Argument>>();
    std::vector<Place> places;
    for (size_t i = 0; i < kernel.parameters.size(); ++i) {
        const int bytes = kernel.parameters[i];
        arguments->push_back(bytes > 0 ? argument(given, i, bytes, who) : address(given, i, bytes < 0, who));
        if (bytes <= 0) places.push_back(arguments->back().place);
    }
    const std::string name = function.name;
    enqueue(on, who, places, [=, &kernel] { kernel.run(name, grid, *arguments); });
}

} // namespace

extern "C" {

CUresult cuModuleLoadData(CUmodule *made, const void *image) {
    return call([&] {
        if (!current()) return CUDA_ERROR_INVALID_CONTEXT;
        refuse_in_capture();
        auto module = std::make_unique<Module>();
        module->owner = current();
        const CUresult result = field<uint32_t>(image, 0) == FATBIN ? load_fatbin(*module, static_cast<const char *>(image))
                                                                    : load_ptx(*module, static_cast<const char *>(image));
        if (result != CUDA_SUCCESS) return result;
        *made = reinterpret_cast<CUmodule>(module.release());
        return CUDA_SUCCESS;
    });
}

CUresult cuModuleUnload(CUmodule module) {
    // Work that is still to run may name its functions, so it stays.
    return module ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

CUresult cuModuleGetFunction(CUfunction *made, CUmodule handle, const char *name) {
    return call([&] {
        Module &module = of(handle);
        auto function = std::make_unique<Function>();
        function->module = &module;
        function->name = name;
        if (!module.file.empty()) {
            const char *file = nullptr;
            if (kernels(module.element).arguments(name, &file, &function->buffers, &function->parameter_bytes))
                return CUDA_ERROR_NOT_FOUND;
            if (std::string(file).find("/" + module.file + ".cu") == std::string::npos) return CUDA_ERROR_NOT_FOUND;
        } else {
            const auto entry = module.entries.find(name);
            if (entry == module.entries.end()) return CUDA_ERROR_NOT_FOUND;
            open_candle(*function, entry->second);
        }
        *made = reinterpret_cast<CUfunction>(function.get());
        module.functions[name + std::to_string(module.functions.size())] = std::move(function);
        return CUDA_SUCCESS;
    });
}

CUresult cuFuncSetAttribute(CUfunction handle, CUfunction_attribute attribute, int value) {
    return call([&] {
        if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES)
            throw Fault("cuFuncSetAttribute: attribute " + std::to_string(attribute) + " is not in the stand-in");
        if (value < 0 || value > MAX_SHARED) return CUDA_ERROR_INVALID_VALUE;
        of(handle).shared_limit = std::max(PLAIN_SHARED, value);
        return CUDA_SUCCESS;
    });
}

CUresult cuLaunchKernel(CUfunction handle, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz, unsigned shared,
                        CUstream on_handle, void **arguments, void **) {
    return call([&] {
        Function &function = of(handle);
        Stream &on = stream(on_handle, "cuLaunchKernel: " + function.name);
        if (function.module->owner != on.owner) return CUDA_ERROR_INVALID_HANDLE;
        const Grid grid{{x, y, z}, {tx, ty, tz}};
        CUresult result = CUDA_SUCCESS;
        check_grid(grid, shared, function, result);
        if (result != CUDA_SUCCESS) return result;
        const bool own = !function.module->file.empty();
        if (!own && !function.candle)
            throw Fault("candle's kernel " + function.name + " is not in tests/stand_in/cuda/candle.cpp");
        count(own ? "kernel" : "candle's kernel", function.name);
        if (own) launch_own(on, function, grid, shared, arguments);
        else launch_candle(on, function, grid, arguments);
        return CUDA_SUCCESS;
    });
}

} // extern "C"
