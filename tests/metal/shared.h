// After kernels/metal.h: what clang's C++ has not and Metal has. Local variables in threadgroup memory, and copies of a
// struct from the constant address space.
#undef SHARED
#define SHARED(T, name, count) static threadgroup T name[count]
#undef PARAMETERS
#define PARAMETERS(i, S, name) const S name [[buffer(i)]]
