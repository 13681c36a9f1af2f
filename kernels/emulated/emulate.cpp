// What the host calls. A file of its own, so that the machine is compiled once for a library and not with each kernel file.
// It is compiled like them, with `-include kernels/emulated.h`.

// Launches `kernel`: 0, or 1 and what was wrong in `message`. Several threads may launch at a time.
extern "C" __attribute__((visibility("default"))) int
emulate(const char *kernel, const emulated::Launch *launch, char *message, uint64_t message_bytes) {
    const std::string fault = emulated::run(kernel, *launch);
    const std::string text = fault.empty() ? fault : kernel + (": " + fault);
    if (message_bytes) snprintf(message, message_bytes, "%s", text.c_str());
    return !fault.empty();
}

// The file of `kernel`, how many buffers it takes, and the bytes of its parameters: 0, or 1 if the library has no such
// kernel. For a driver, which is given addresses without their number.
extern "C" __attribute__((visibility("default"))) int
emulated_arguments(const char *kernel, const char **file, uint32_t *buffers, uint64_t *parameter_bytes) {
    const auto found = emulated::kernels().find(kernel);
    if (found == emulated::kernels().end()) return 1;
    *file = found->second.file.c_str();
    *buffers = 0, *parameter_bytes = 0;
    for (const emulated::Shape &shape : found->second.shapes) {
        if (shape.buffer) *buffers += 1;
        else *parameter_bytes = shape.bytes;
    }
    return 0;
}
