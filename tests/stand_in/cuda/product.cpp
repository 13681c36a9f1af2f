// Matrix products in f32.
#include "product.h"
#include "emulated/half.h"

#include <chrono>
#include <cstring>
#include <thread>

using emulated::bf16;
using emulated::f16;

namespace stand_in {

namespace {

float read(const unsigned char *data, int dtype, int64_t i) {
    switch (dtype) {
    case R_16F: return float(reinterpret_cast<const f16 *>(data)[i]);
    case R_16BF: return float(reinterpret_cast<const bf16 *>(data)[i]);
    default: return reinterpret_cast<const float *>(data)[i];
    }
}

void write(unsigned char *data, int dtype, int64_t i, float value) {
    switch (dtype) {
    case R_16F: reinterpret_cast<f16 *>(data)[i] = f16(value); break;
    case R_16BF: reinterpret_cast<bf16 *>(data)[i] = bf16(value); break;
    default: reinterpret_cast<float *>(data)[i] = value;
    }
}

// Places of a matrix of `rows` by `columns`; its leading dimension was checked.
Place place(const Product &product, const char *name, const Matrix &matrix, int64_t rows, int64_t columns) {
    const int64_t last = (product.batch - 1) * matrix.stride + (columns - 1) * matrix.lead + rows;
    const std::string who = product.who + ": matrix " + name;
    if (matrix.address % bytes_of(matrix.dtype)) throw Fault(who + ": an address between elements");
    return find(matrix.address, uint64_t(last) * bytes_of(matrix.dtype), who);
}

// op(X) [rows, columns], row by row, as f32.
std::vector<float> widened(const unsigned char *data, const Matrix &x, bool transposed, int64_t rows, int64_t columns) {
    std::vector<float> all(rows * columns);
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j)
            all[i * columns + j] = read(data, x.dtype, transposed ? i * x.lead + j : j * x.lead + i);
    return all;
}

struct Places {
    Place a, b, c, d, bias;
};

void compute(const Product &p, const Places &at, int64_t batch) {
    auto of = [&](const Place &place, const Matrix &x) { return place.data() + batch * x.stride * bytes_of(x.dtype); };
    const std::vector<float> a = widened(of(at.a, p.a), p.a, p.transpose_a, p.m, p.k);
    // op(B)ᵀ, so that both are read along k.
    const std::vector<float> b = widened(of(at.b, p.b), p.b, p.transpose_b, p.k, p.n);
    std::vector<float> row(p.n);
    for (int64_t i = 0; i < p.m; ++i) {
        std::fill(row.begin(), row.end(), 0.0f);
        for (int64_t l = 0; l < p.k; ++l)
            for (int64_t j = 0; j < p.n; ++j) row[j] += a[i * p.k + l] * b[l * p.n + j];
        const float bias = p.bias ? read(at.bias.data(), p.bias_dtype, i) : 0.0f;
        for (int64_t j = 0; j < p.n; ++j) {
            float value = p.alpha * row[j] + bias;
            if (p.beta != 0) value += p.beta * read(of(at.c, p.c), p.c.dtype, j * p.c.lead + i);
            write(of(at.d, p.d), p.d.dtype, j * p.d.lead + i, value);
        }
    }
}

} // namespace

uint64_t bytes_of(int dtype) { return dtype == R_32F ? 4 : dtype == R_16F || dtype == R_16BF ? 2 : 0; }

int multiply(Stream &stream, const Product &p) {
    for (const Matrix *x : {&p.a, &p.b, &p.c, &p.d})
        if (!bytes_of(x->dtype)) throw Fault(p.who + ": dtype " + std::to_string(x->dtype) + " is not in the stand-in");
    if (p.m < 0 || p.n < 0 || p.k < 0 || p.batch < 0) return INVALID_VALUE;
    const int64_t rows_a = p.transpose_a ? p.k : p.m, rows_b = p.transpose_b ? p.n : p.k;
    const auto leads = [](int64_t lead, int64_t rows) { return lead >= std::max<int64_t>(1, rows); };
    if (!leads(p.a.lead, rows_a) || !leads(p.b.lead, rows_b) || !leads(p.c.lead, p.m) || !leads(p.d.lead, p.m))
        return INVALID_VALUE;
    if (p.a.dtype != p.b.dtype || (p.a.dtype != p.d.dtype && p.d.dtype != R_32F) || p.c.dtype != p.d.dtype) return NOT_SUPPORTED;
    if (p.m == 0 || p.n == 0 || p.batch == 0) return SUCCESS;
    Places at;
    at.a = place(p, "A", p.a, rows_a, p.transpose_a ? p.m : p.k);
    at.b = place(p, "B", p.b, rows_b, p.transpose_b ? p.k : p.n);
    at.d = place(p, "D", p.d, p.m, p.n);
    if (p.beta != 0) at.c = place(p, "C", p.c, p.m, p.n);
    if (p.bias) at.bias = find(p.bias, p.m * bytes_of(p.bias_dtype), p.who + ": bias");
    count("product", p.who);
    if (settings().dry && !(at.a.exists() && at.b.exists() && at.d.exists())) {
        // As long as a GPU of 1 PFLOP/s would take: benchmarks repeat a product for so many seconds.
        const double seconds = 2e-15 * double(p.m) * double(p.n) * double(p.k) * double(p.batch);
        enqueue(stream, p.who, {}, [seconds] { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); });
        return SUCCESS;
    }
    enqueue(stream, p.who, {at.a, at.b, at.c, at.d, at.bias}, [p, at] {
        for (int64_t batch = 0; batch < p.batch; ++batch) compute(p, at, batch);
    });
    return SUCCESS;
}

} // namespace stand_in
