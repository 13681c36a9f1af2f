// After kernels/metal.h: clang has no local variables in address spaces of their own, Metal has.
#undef SHARED
#define SHARED(T, name, count) static threadgroup T name[count]
