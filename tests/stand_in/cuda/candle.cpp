// candle's kernels that gneiss's paths use, written once more, small. One that is not here fails by name when it is
// launched, so this list is complete; each is also a launch that could be saved.
//
// Parameters are those of candle-kernels 0.11.1; loading holds their number and sizes against the PTX that candle brings.
#include "emulated/half.h"
#include "modules.h"

#include <cmath>
#include <cstring>

using namespace stand_in;
using emulated::bf16;
using emulated::f16;

namespace {

constexpr int MEMORY = 0, MEMORY_OR_NULL = -1, SIZE = 8;

// Elements of memory that an argument points to; an access beyond its end is a fault.
template <typename T>
struct Elements {
    const std::string &kernel;
    int index;
    unsigned char *data;
    uint64_t count;

    T &operator[](uint64_t i) const {
        if (i >= count)
            throw Fault(kernel + ": argument " + std::to_string(index) + ", element " + std::to_string(i) + " of " +
                        std::to_string(count));
        return reinterpret_cast<T *>(data)[i];
    }
};

// The arguments of a launch.
struct Given {
    const std::string &kernel;
    const Grid &grid;
    std::vector<Argument> &arguments;

    template <typename T>
    T value(int i) const {
        T value;
        memcpy(&value, arguments[i].bytes.data(), sizeof value);
        return value;
    }
    uint64_t size(int i) const { return value<uint64_t>(i); }
    bool null(int i) const { return !arguments[i].place.memory; }
    template <typename T>
    Elements<T> elements(int i) const {
        const Place &place = arguments[i].place;
        return {kernel, i, place.data(), place.left() / sizeof(T)};
    }
};

// Where element `i` of a tensor is; `layout` holds the dimensions, then sets of strides.
struct Layout {
    uint64_t dimensions;
    std::vector<uint64_t> sizes, strides;

    // `set`: which of the sets of strides. Null stands for contiguous.
    Layout(const Given &given, int dimensions_at, int layout_at, int set = 0)
        : dimensions(given.null(layout_at) ? 0 : given.size(dimensions_at)) {
        if (!dimensions) return;
        const auto info = given.elements<uint64_t>(layout_at);
        for (uint64_t d = 0; d < dimensions; ++d) {
            sizes.push_back(info[d]);
            strides.push_back(info[(1 + set) * dimensions + d]);
        }
    }
    bool contiguous() const {
        uint64_t expected = 1;
        for (uint64_t d = dimensions; d-- > 0; expected *= sizes[d])
            if (sizes[d] > 1 && strides[d] != expected) return false;
        return true;
    }
    uint64_t at(uint64_t i) const {
        if (!dimensions) return i;
        uint64_t place = 0;
        for (uint64_t d = dimensions; d-- > 0; i /= sizes[d]) place += i % sizes[d] * strides[d];
        return place;
    }
};

float wide(float x) { return x; }
float wide(bf16 x) { return float(x); }
float wide(f16 x) { return float(x); }
double wide(double x) { return x; }
template <typename T>
T wide(T x) {
    return x;
}

// numel, dimensions, layout, input or null for in place, output, factor, summand.
template <typename T>
void affine(const Given &given) {
    const Layout layout(given, 1, 2);
    const auto out = given.elements<T>(4);
    const auto factor = wide(given.value<T>(5)), summand = wide(given.value<T>(6));
    for (uint64_t i = 0; i < given.size(0); ++i) {
        const T x = given.null(3) ? T(out[i]) : T(given.elements<T>(3)[layout.at(i)]);
        out[i] = T(wide(x) * factor + summand);
    }
}

// numel, dimensions, layout, input, output.
template <typename From, typename To>
void cast(const Given &given) {
    const Layout layout(given, 1, 2);
    const auto from = given.elements<From>(3);
    const auto to = given.elements<To>(4);
    for (uint64_t i = 0; i < given.size(0); ++i) to[i] = To(wide(from[layout.at(i)]));
}

// numel, dimensions, layout, input or null for in place, output.
template <typename T, typename F>
void unary(const Given &given, F f) {
    const Layout layout(given, 1, 2);
    const auto to = given.elements<T>(4);
    for (uint64_t i = 0; i < given.size(0); ++i)
        to[i] = f(given.null(3) ? T(to[i]) : T(given.elements<T>(3)[layout.at(i)]));
}

// numel, dimensions, layout with two sets of strides, left, right, output.
template <typename T, typename To = T, typename F>
void binary(const Given &given, F f) {
    const Layout left(given, 1, 2, 0), right(given, 1, 2, 1);
    const auto a = given.elements<T>(3), b = given.elements<T>(4);
    const auto to = given.elements<To>(5);
    for (uint64_t i = 0; i < given.size(0); ++i) to[i] = To(f(wide(a[left.at(i)]), wide(b[right.at(i)])));
}

// numel, dimensions, layout, value, output.
template <typename T>
void const_set(const Given &given) {
    const Layout layout(given, 1, 2);
    const auto to = given.elements<T>(4);
    for (uint64_t i = 0; i < given.size(0); ++i) to[layout.at(i)] = given.value<T>(3);
}

// source, target, rows, columns, strides of source and target; a thread an element.
template <typename T>
void copy2d(const Given &given) {
    const auto from = given.elements<T>(0), to = given.elements<T>(1);
    const uint64_t rows = given.value<uint32_t>(2), columns = given.value<uint32_t>(3);
    if (given.grid.all_threads() < rows * columns) throw Fault(given.kernel + ": fewer threads than elements");
    for (uint64_t i = 0; i < rows * columns; ++i)
        to[i / columns * given.value<uint32_t>(5) + i % columns] = from[i / columns * given.value<uint32_t>(4) + i % columns];
}

// numel, dimensions and layout of the ids, ids, input, output, sizes left of the dimension, of the input's, of the ids, and right of it.
template <typename T>
void index_select(const Given &given) {
    if (!Layout(given, 1, 2).contiguous()) throw Fault(given.kernel + ": expected contiguous ids");
    const auto ids = given.elements<uint32_t>(3);
    const auto from = given.elements<T>(4), to = given.elements<T>(5);
    const uint64_t rows = given.size(7), selected = given.size(8), right = given.size(9);
    for (uint64_t i = 0; i < given.size(0); ++i) {
        const uint64_t id = ids[i / right % selected];
        if (id >= rows) throw Fault(given.kernel + ": id " + std::to_string(id) + " of " + std::to_string(rows));
        to[i] = from[(i / (selected * right) * rows + id) * right + i % right];
    }
}

// ids, their number, input, output, sizes left of the dimension, of the input's and the output's, and right of it.
template <typename T>
void index_add(const Given &given) {
    const auto ids = given.elements<uint32_t>(0);
    const auto from = given.elements<T>(2), to = given.elements<T>(3);
    const uint64_t count = given.size(1), left = given.size(4), rows = given.size(6), right = given.size(7);
    for (uint64_t l = 0; l < left; ++l)
        for (uint64_t j = 0; j < count; ++j)
            for (uint64_t r = 0; r < right; ++r) {
                if (ids[j] >= rows) throw Fault(given.kernel + ": id " + std::to_string(ids[j]) + " of " + std::to_string(rows));
                T &sum = to[(l * rows + ids[j]) * right + r];
                sum = T(wide(sum) + wide(from[(l * count + j) * right + r]));
            }
}

// ids, one for each element of the input, input, output, sizes as in index_add.
template <typename T>
void scatter(const Given &given) {
    const auto ids = given.elements<uint32_t>(0);
    const auto from = given.elements<T>(1), to = given.elements<T>(2);
    const uint64_t left = given.size(3), count = given.size(4), rows = given.size(5), right = given.size(6);
    for (uint64_t i = 0; i < left * count * right; ++i) {
        if (ids[i] >= rows) throw Fault(given.kernel + ": id " + std::to_string(ids[i]) + " of " + std::to_string(rows));
        to[(i / (count * right) * rows + ids[i]) * right + i % right] = from[i];
    }
}

// numel of the input, or of the output if `small`; elements of a sum, dimensions, layout, input, output.
template <typename T, bool small>
void sum(const Given &given) {
    const Layout layout(given, 2, 3);
    const auto from = given.elements<T>(4), to = given.elements<T>(5);
    const uint64_t each = given.size(1), sums = small ? given.size(0) : given.size(0) / each;
    for (uint64_t i = 0; i < sums; ++i) {
        double total = 0;
        for (uint64_t j = 0; j < each; ++j) total += double(wide(from[layout.at(i * each + j)]));
        to[i] = T(total);
    }
}

// The same arguments; the output is the place of the largest of each, the first of equal ones.
template <typename T>
void argmax(const Given &given) {
    const Layout layout(given, 2, 3);
    const auto from = given.elements<T>(4);
    const auto to = given.elements<uint32_t>(5);
    const uint64_t all = given.size(0), each = given.size(1);
    for (uint64_t i = 0; i < all / each; ++i) {
        uint64_t best = 0;
        for (uint64_t j = 1; j < each; ++j)
            if (wide(from[layout.at(i * each + j)]) > wide(from[layout.at(i * each + best)])) best = j;
        to[i] = uint32_t(best);
    }
}

using Run = std::function<void(const Given &)>;
using All = std::map<std::string, CandleKernel>;

void add(All &all, const std::string &name, std::vector<int> parameters, Run run) {
    all[name] = {std::move(parameters), [run](const std::string &kernel, const Grid &grid, std::vector<Argument> &arguments) {
                     run({kernel, grid, arguments});
                 }};
}

template <typename From>
void add_casts(All &all, const std::string &from) {
    const std::vector<int> parameters{SIZE, SIZE, MEMORY_OR_NULL, MEMORY, MEMORY};
    add(all, "cast_" + from + "_f32", parameters, cast<From, float>);
    add(all, "cast_" + from + "_bf16", parameters, cast<From, bf16>);
    add(all, "cast_" + from + "_f16", parameters, cast<From, f16>);
    add(all, "cast_" + from + "_f64", parameters, cast<From, double>);
}

template <typename T>
void add_dtype(All &all, const std::string &dtype) {
    const int bytes = sizeof(T);
    const std::vector<int> unary_parameters{SIZE, SIZE, MEMORY_OR_NULL, MEMORY_OR_NULL, MEMORY};
    const std::vector<int> binary_parameters{SIZE, SIZE, MEMORY_OR_NULL, MEMORY, MEMORY, MEMORY};
    add(all, "affine_" + dtype, {SIZE, SIZE, MEMORY_OR_NULL, MEMORY_OR_NULL, MEMORY, bytes, bytes}, affine<T>);
    add(all, "ucopy_" + dtype, unary_parameters, [](const Given &given) { unary<T>(given, [](T x) { return x; }); });
    add(all, "badd_" + dtype, binary_parameters,
        [](const Given &given) { binary<T>(given, [](auto a, auto b) { return a + b; }); });
    add(all, "bmul_" + dtype, binary_parameters,
        [](const Given &given) { binary<T>(given, [](auto a, auto b) { return a * b; }); });
    add(all, "bsub_" + dtype, binary_parameters,
        [](const Given &given) { binary<T>(given, [](auto a, auto b) { return a - b; }); });
    add(all, "gt_" + dtype, binary_parameters,
        [](const Given &given) { binary<T, uint8_t>(given, [](auto a, auto b) { return a > b; }); });
    add(all, "urelu_" + dtype, unary_parameters,
        [](const Given &given) { unary<T>(given, [](T x) { return wide(x) > 0 ? x : T(0); }); });
    add(all, "usqr_" + dtype, unary_parameters,
        [](const Given &given) { unary<T>(given, [](T x) { return T(wide(x) * wide(x)); }); });
    add(all, "usqrt_" + dtype, unary_parameters,
        [](const Given &given) { unary<T>(given, [](T x) { return T(std::sqrt(float(wide(x)))); }); });
    add(all, "urecip_" + dtype, unary_parameters,
        [](const Given &given) { unary<T>(given, [](T x) { return T(1.0f / float(wide(x))); }); });
    add(all, "utanh_" + dtype, unary_parameters,
        [](const Given &given) { unary<T>(given, [](T x) { return T(std::tanh(float(wide(x)))); }); });
    add(all, "const_set_" + dtype, {SIZE, SIZE, MEMORY_OR_NULL, bytes, MEMORY}, const_set<T>);
    add(all, "copy2d_" + dtype, {MEMORY, MEMORY, 4, 4, 4, 4}, copy2d<T>);
    add(all, "is_u32_" + dtype, {SIZE, SIZE, MEMORY_OR_NULL, MEMORY, MEMORY, MEMORY, SIZE, SIZE, SIZE, SIZE}, index_select<T>);
    add(all, "ia_u32_" + dtype, {MEMORY, SIZE, MEMORY, MEMORY, SIZE, SIZE, SIZE, SIZE}, index_add<T>);
    add(all, "s_u32_" + dtype, {MEMORY, MEMORY, MEMORY, SIZE, SIZE, SIZE, SIZE}, scatter<T>);
    add(all, "fast_argmax_" + dtype, {SIZE, SIZE, SIZE, MEMORY_OR_NULL, MEMORY, MEMORY}, argmax<T>);
    add(all, "fast_sum_" + dtype, {SIZE, SIZE, SIZE, MEMORY_OR_NULL, MEMORY, MEMORY}, sum<T, false>);
    add(all, "fast_sum_small_" + dtype, {SIZE, SIZE, SIZE, MEMORY_OR_NULL, MEMORY, MEMORY}, sum<T, true>);
}

All make() {
    All all;
    add_dtype<float>(all, "f32");
    add_dtype<bf16>(all, "bf16");
    add_dtype<f16>(all, "f16");
    add_dtype<uint32_t>(all, "u32");
    add_casts<float>(all, "f32");
    add_casts<bf16>(all, "bf16");
    add_casts<f16>(all, "f16");
    add_casts<double>(all, "f64");
    add_casts<uint8_t>(all, "u8");
    return all;
}

} // namespace

const CandleKernel *stand_in::candle_kernel(const std::string &name) {
    static const All &all = *new All(make());
    const auto found = all.find(name);
    return found == all.end() ? nullptr : &found->second;
}
