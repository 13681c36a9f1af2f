// After kernels/metal.h: what clang's C++ has not and Metal has, local variables in threadgroup memory.
#undef SHARED
#define SHARED(T, name, count) static threadgroup T name[count]
