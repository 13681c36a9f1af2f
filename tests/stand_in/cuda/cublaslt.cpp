// cuBLASLt: descriptions of products, proposals of algorithms, and products.
//
// An algorithm remembers what it was proposed for (alignment, workspace, how it adds up); running it holds the product
// against that.
#include "product.h"

#include <cstring>

using namespace stand_in;

namespace {

// Attributes' numbers, from cublasLt.h of CUDA 13.
enum { DESC_TRANSA = 3, DESC_TRANSB = 4, DESC_EPILOGUE = 7, DESC_BIAS_POINTER = 8 };
enum { PREF_WORKSPACE = 1, PREF_REDUCTION = 3, PREF_ALIGNMENT_A = 5, PREF_ALIGNMENT_D = 8 };
enum { EPILOGUE_DEFAULT = 1, EPILOGUE_BIAS = 4 };
enum { SCHEME_COMPUTE_TYPE = 2 };

constexpr uint64_t MAGIC = 0x676e65697373;
constexpr int ALGORITHMS = 3;

struct Layout {
    int dtype;
    uint64_t rows, columns;
    int64_t lead;
};

struct Description {
    bool transpose_a = false, transpose_b = false;
    uint32_t epilogue = EPILOGUE_DEFAULT;
    CUdeviceptr bias = 0;
};

struct Preference {
    uint64_t workspace = 0;
    uint32_t schemes = 7; // all of them, as the library has it
    uint32_t alignment[4] = {256, 256, 256, 256};
};

// cublasLtMatmulAlgo_t.
struct Algorithm {
    uint64_t magic, workspace, schemes, alignment[4], number;
};
static_assert(sizeof(Algorithm) == 64, "as in cublasLt.h");

// cublasLtMatmulHeuristicResult_t.
struct Proposal {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

template <typename F>
int status(F body) {
    LOCKED;
    try {
        return body();
    } catch (const Fault &problem) {
        fault(problem.what());
        return 13;
    } catch (const Refusal &) {
        return 13;
    }
}

template <typename T>
T given(const char *who, const void *value, size_t bytes) {
    if (bytes != sizeof(T))
        throw Fault(std::string(who) + ": a value of " + std::to_string(bytes) + " bytes, expected " + std::to_string(sizeof(T)));
    T read;
    memcpy(&read, value, sizeof read);
    return read;
}

Product describe(const Description &description, const Layout &a, const Layout &b, const Layout &c, const Layout &d) {
    Product p;
    p.who = "cublasLtMatmul";
    p.transpose_a = description.transpose_a, p.transpose_b = description.transpose_b;
    p.m = p.transpose_a ? a.columns : a.rows;
    p.k = p.transpose_a ? a.rows : a.columns;
    p.n = p.transpose_b ? b.rows : b.columns;
    const int64_t k = p.transpose_b ? b.columns : b.rows;
    const bool fit = p.k == k && int64_t(d.rows) == p.m && int64_t(d.columns) == p.n && c.rows == d.rows && c.columns == d.columns;
    if (!fit)
        throw Fault("cublasLtMatmul: matrices of [" + std::to_string(p.m) + ", " + std::to_string(p.k) + "] and [" + std::to_string(k) +
                    ", " + std::to_string(p.n) + "] do not make [" + std::to_string(d.rows) + ", " + std::to_string(d.columns) + "]");
    p.a = {0, a.dtype, a.lead, 0}, p.b = {0, b.dtype, b.lead, 0}, p.c = {0, c.dtype, c.lead, 0}, p.d = {0, d.dtype, d.lead, 0};
    p.bias_dtype = d.dtype;
    return p;
}

} // namespace

extern "C" {

int cublasLtCreate(Device **handle) {
    return status([&] {
        if (!current() || settings().driver < 13000) return NOT_INITIALIZED;
        *handle = current();
        return SUCCESS;
    });
}
int cublasLtDestroy(Device *) { return SUCCESS; }
size_t cublasLtGetVersion(void) { return 130002; }

int cublasLtMatrixLayoutCreate(Layout **made, int dtype, uint64_t rows, uint64_t columns, int64_t lead) {
    *made = new Layout{dtype, rows, columns, lead};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout *layout) {
    delete layout;
    return SUCCESS;
}

int cublasLtMatmulDescCreate(Description **made, int compute, int scale) {
    return status([&] {
        if (compute != COMPUTE_32F || scale != R_32F)
            throw Fault("cublasLtMatmulDescCreate: only CUBLAS_COMPUTE_32F with f32 factors is in the stand-in");
        *made = new Description();
        return SUCCESS;
    });
}
int cublasLtMatmulDescSetAttribute(Description *description, int attribute, const void *value, size_t bytes) {
    return status([&] {
        const char *who = "cublasLtMatmulDescSetAttribute";
        switch (attribute) {
        case DESC_TRANSA: description->transpose_a = given<int32_t>(who, value, bytes) == 1; break;
        case DESC_TRANSB: description->transpose_b = given<int32_t>(who, value, bytes) == 1; break;
        case DESC_EPILOGUE: description->epilogue = given<uint32_t>(who, value, bytes); break;
        case DESC_BIAS_POINTER: description->bias = given<CUdeviceptr>(who, value, bytes); break;
        default: throw Fault(std::string(who) + ": attribute " + std::to_string(attribute) + " is not in the stand-in");
        }
        return SUCCESS;
    });
}
int cublasLtMatmulDescDestroy(Description *description) {
    delete description;
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(Preference **made) {
    *made = new Preference();
    return SUCCESS;
}
int cublasLtMatmulPreferenceSetAttribute(Preference *preference, int attribute, const void *value, size_t bytes) {
    return status([&] {
        const char *who = "cublasLtMatmulPreferenceSetAttribute";
        if (attribute == PREF_WORKSPACE) preference->workspace = given<uint64_t>(who, value, bytes);
        else if (attribute == PREF_REDUCTION) preference->schemes = given<uint32_t>(who, value, bytes);
        else if (attribute >= PREF_ALIGNMENT_A && attribute <= PREF_ALIGNMENT_D)
            preference->alignment[attribute - PREF_ALIGNMENT_A] = given<uint32_t>(who, value, bytes);
        else throw Fault(std::string(who) + ": attribute " + std::to_string(attribute) + " is not in the stand-in");
        return SUCCESS;
    });
}
int cublasLtMatmulPreferenceDestroy(Preference *preference) {
    delete preference;
    return SUCCESS;
}

int cublasLtMatmulAlgoGetHeuristic(Device *, Description *description, Layout *a, Layout *b, Layout *c, Layout *d, Preference *preference,
                                   int requested, Proposal *proposals, int *found) {
    return status([&] {
        describe(*description, *a, *b, *c, *d);
        if (!settings().algorithms) return NOT_SUPPORTED;
        count("proposals of algorithms", "cublasLtMatmulAlgoGetHeuristic");
        *found = std::min(requested, ALGORITHMS);
        for (int i = 0; i < *found; ++i) {
            Algorithm algorithm{MAGIC, preference->workspace, preference->schemes, {}, uint64_t(i)};
            for (int j = 0; j < 4; ++j) algorithm.alignment[j] = preference->alignment[j];
            proposals[i] = {algorithm, size_t(preference->workspace), SUCCESS, 1.0f, {}};
        }
        return SUCCESS;
    });
}

int cublasLtMatmul(Device *handle, Description *description, const float *alpha, const void *a, Layout *layout_a, const void *b,
                   Layout *layout_b, const float *beta, const void *c, Layout *layout_c, void *d, Layout *layout_d,
                   const Algorithm *algorithm, void *workspace, size_t workspace_bytes, CUstream handle_of_stream) {
    return status([&] {
        Product p = describe(*description, *layout_a, *layout_b, *layout_c, *layout_d);
        if (handle != current()) throw Fault(p.who + ": the handle is another context's than the current one");
        const void *addresses[4] = {a, b, c, d};
        Matrix *matrices[4] = {&p.a, &p.b, &p.c, &p.d};
        for (int i = 0; i < 4; ++i) matrices[i]->address = reinterpret_cast<CUdeviceptr>(addresses[i]);
        p.alpha = *alpha, p.beta = *beta;
        if (description->epilogue == EPILOGUE_BIAS) p.bias = description->bias;
        else if (description->epilogue != EPILOGUE_DEFAULT)
            throw Fault(p.who + ": epilogue " + std::to_string(description->epilogue) + " is not in the stand-in");
        if (description->epilogue == EPILOGUE_BIAS && !p.bias) return INVALID_VALUE;
        if (!algorithm || algorithm->magic != MAGIC) throw Fault(p.who + ": no algorithm that was proposed");
        for (int i = 0; i < 4; ++i)
            if (matrices[i]->address % algorithm->alignment[i])
                throw Fault(p.who + ": matrix " + "ABCD"[i] + " at " + hex(matrices[i]->address) + ", the algorithm was proposed for a multiple of " +
                            std::to_string(algorithm->alignment[i]));
        if (workspace_bytes < algorithm->workspace) return INVALID_VALUE;
        if (workspace_bytes) find(reinterpret_cast<CUdeviceptr>(workspace), workspace_bytes, p.who + ": workspace");
        if (p.c.address == p.d.address && p.beta != 0 && p.c.lead != p.d.lead) return INVALID_VALUE;
        const bool half = p.a.dtype != R_32F;
        count("product in 16 bits", !half ? "none" : algorithm->schemes & ~SCHEME_COMPUTE_TYPE ? "sums may be 16 bits" : "sums are f32");
        return multiply(stream(handle_of_stream, p.who), p);
    });
}

} // extern "C"
