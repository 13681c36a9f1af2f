// Fibers: stacks of their own that are switched to and from by hand. For x86-64 and aarch64, ELF and Mach-O.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

// A local symbol in each object file, so that several files link into one library.
#if defined(__APPLE__)
#define EMULATED_TEXT ".text\n.p2align 4\n"
#define EMULATED_TEXT_END ""
#else
#define EMULATED_TEXT ".pushsection .text\n.p2align 4\n"
#define EMULATED_TEXT_END ".popsection\n"
#endif

// Saves the registers that a callee keeps and the stack pointer, takes those of `to`, and returns there.
extern "C" void emulated_switch(void **from, void *to) __asm__("emulated_switch");

#if defined(__x86_64__)
__asm__(EMULATED_TEXT
        "emulated_switch:\n"
        "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
        "movq %rsp, (%rdi)\n"
        "movq %rsi, %rsp\n"
        "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\n"
        "ret\n" EMULATED_TEXT_END);
#elif defined(__aarch64__)
__asm__(EMULATED_TEXT
        "emulated_switch:\n"
        "sub sp, sp, #160\n"
        "stp x19, x20, [sp]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\n"
        "stp x25, x26, [sp, #48]\nstp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
        "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
        "mov x9, sp\nstr x9, [x0]\n"
        "mov sp, x1\n"
        "ldp x19, x20, [sp]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\n"
        "ldp x25, x26, [sp, #48]\nldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
        "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
        "add sp, sp, #160\n"
        "ret\n" EMULATED_TEXT_END);
#else
#error "the emulator's fibers are written for x86-64 and aarch64"
#endif

namespace emulated __attribute__((visibility("hidden"))) {

constexpr size_t STACK_BYTES = 128 * 1024;
constexpr uint64_t STACK_END = 0x5eed5eed5eed5eedull;

// Lays out `stack` (of STACK_BYTES, 16-byte aligned) so that a switch to what is returned calls `entry`.
inline void *fresh_stack(unsigned char *stack, void (*entry)()) {
    memcpy(stack, &STACK_END, sizeof STACK_END);
    unsigned char *top = stack + STACK_BYTES;
#if defined(__x86_64__)
    // Six registers, the address to return to, and a word that keeps the stack as a call leaves it.
    constexpr size_t frame = 64, address = 48;
#else
    constexpr size_t frame = 160, address = 88;
#endif
    memset(top - frame, 0, frame);
    memcpy(top - frame + address, &entry, sizeof entry);
    return top - frame;
}

// Whether the fiber has used more stack than it has.
inline bool overflown(const unsigned char *stack) { return memcmp(stack, &STACK_END, sizeof STACK_END) != 0; }

} // namespace emulated
