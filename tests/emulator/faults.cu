// Kernels with one fault each, for the test that the emulator finds them; and one without.
// All take 64 threads; x and y are [64].

struct FaultParameters { uint width; };

KERNEL(fault_none, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    SHARED(float, tile, 64);
    tile[THREAD] = x[THREAD % p.width];
    BARRIER();
    y[THREAD] = warp_sum(tile[(THREAD + 1) % 64]);
}

KERNEL(fault_out_of_bounds, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    y[THREAD] = x[THREAD + p.width];
}

KERNEL(fault_missing_barrier, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    SHARED(float, tile, 64);
    tile[THREAD] = x[THREAD % p.width];
    BARRIER();
    y[THREAD] = tile[63 - THREAD];
    tile[THREAD] = 0.0f;
}

KERNEL(fault_diverged_barrier, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    if (THREAD < p.width) BARRIER();
    y[THREAD] = x[THREAD];
}

KERNEL(fault_two_barriers, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    if (THREAD < p.width) {
        BARRIER();
    } else {
        BARRIER();
    }
    y[THREAD] = x[THREAD];
}

KERNEL(fault_diverged_warp, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    y[THREAD] = x[THREAD];
    if (THREAD < p.width) y[THREAD] = warp_sum(x[THREAD]);
}

KERNEL(fault_unwritten_shared, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    SHARED(float, tile, 64);
    if (THREAD < p.width) tile[THREAD] = x[THREAD];
    BARRIER();
    y[THREAD] = tile[THREAD];
}

KERNEL(fault_two_blocks, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    if (THREAD < p.width) y[THREAD] = x[THREAD];
}

KERNEL(fault_misaligned, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    float values[8];
    load8(x, p.width, 8, true, values);
    if (THREAD < 8) y[THREAD] = values[THREAD];
}

KERNEL(fault_overlap, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    if (THREAD < p.width) y[THREAD] = x[THREAD] + 1.0f;
}

KERNEL(fault_too_much_shared, 64, IN(0, float, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    SHARED(float, tile, 8193);
    tile[THREAD] = x[THREAD];
    if (THREAD < p.width) y[THREAD] = tile[THREAD];
}

#if !defined(ELEMENT_F32)
KERNEL(fault_missing_wait, 64, IN(0, Element, x), OUT(1, float, y), PARAMETERS(2, FaultParameters, p)) {
    SHARED(Element, tile, 64);
    if (THREAD < 8) cp_async16(tile + 8 * THREAD, x + 8 * THREAD, true);
    cp_async_commit();
    if (p.width < 64) cp_async_wait(0);
    BARRIER();
    y[THREAD] = wide(tile[THREAD]);
}
#endif
