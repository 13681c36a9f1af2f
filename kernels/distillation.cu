// Kullback-Leibler divergence of a student's softmax from a teacher's, logits [rows, stride], whose first `vocab` columns
// are tokens (src/ops/distillation/mod.rs):
//
//   log p    = scale * teacher - lse(scale * teacher)
//   log q    = scale * student - lse(scale * student)
//   kl       = sum(p * (d + exp(-d) - 1)), d = log p - log q
//   dstudent = dloss * scale * (q - p)     in the place of the student's logits, and 0 after column vocab; dloss of the
//                                          row if per_row, else one for all rows
//
// The logits' addresses must be multiples of 16 bytes. A row of an odd stride starts anywhere: it is a head of up to 7
// columns, chunks of 8 on 16-byte boundaries, and a tail of up to 7.

struct DistillationParameters {
    uint rows, vocab, stride, per_row;
    float scale, dloss;
};

// Chunks whose loads are on their way together, of each of the two rows.
#define TOGETHER 2
// Starts a maximum. Not minus infinity: its difference with itself is no number, and Metal's fast maths has none.
#define LOWEST (-1e38f)
// Differences of log-probabilities below this use the series, which is exact to 4e-7 there.
#define SMALL 0.25f

// Columns [head, head + 8 * chunks) are chunks.
struct RowParts {
    uint head, chunks, tail;
};

INLINE RowParts row_parts(index_t row, uint vocab) {
    const uint to_boundary = uint(8 - row % 8) % 8, head = to_boundary < vocab ? to_boundary : vocab;
    RowParts parts = {head, (vocab - head) / 8, (vocab - head) % 8};
    return parts;
}

// The column of the head or tail that a thread does alone: of the head threads 0 to 6, of the tail 8 to 14. `vocab` for
// the other threads.
INLINE uint edge_column(RowParts parts, uint worker, uint vocab) {
    if (worker < parts.head) return worker;
    return worker >= 8 && worker - 8 < parts.tail ? vocab - parts.tail + worker - 8 : vocab;
}

// The maximum of the values so far, and the sum of exp(z - maximum).
struct Exponentials {
    float maximum, sum;
};

INLINE Exponentials with1(Exponentials sum, float z) {
    const float maximum = max_(sum.maximum, z);
    Exponentials next = {maximum, sum.sum * exp_(sum.maximum - maximum) + exp_(z - maximum)};
    return next;
}

INLINE Exponentials with8(Exponentials sum, float scale, LOCAL(const float) logits) {
    float maximum = sum.maximum;
    UNROLL for (uint i = 0; i < 8; ++i) maximum = max_(maximum, scale * logits[i]);
    Exponentials next = {maximum, sum.sum * exp_(sum.maximum - maximum)};
    UNROLL for (uint i = 0; i < 8; ++i) next.sum += exp_(scale * logits[i] - maximum);
    return next;
}

// Log-sum-exp over the block's threads, all of which must come to it; `scratch` is 64 floats that nobody else uses.
INLINE float block_lse(Exponentials own, GROUP(float) scratch, uint worker, uint workers) {
    const uint lane = worker % 32, warp = worker / 32, warps = workers / 32;
    float maximum = warp_max(own.maximum), sum = warp_sum(own.sum * exp_(own.maximum - maximum));
    if (lane == 0) {
        scratch[warp] = maximum;
        scratch[32 + warp] = sum;
    }
    BARRIER();
    const float of_warp = lane < warps ? scratch[lane] : LOWEST;
    maximum = warp_max(of_warp);
    sum = warp_sum(lane < warps ? scratch[32 + lane] * exp_(of_warp - maximum) : 0.0f);
    BARRIER();
    return maximum + log_(sum);
}

// p * (d + exp(-d) - 1): no term is negative, so that a small divergence is not lost in rounding.
INLINE float divergence(float log_p, float log_q) {
    const float p = exp_(log_p), d = log_p - log_q;
    if (d < SMALL && d > -SMALL)
        return p * d * d * (0.5f + d * (-1.0f / 6 + d * (1.0f / 24 + d * (-1.0f / 120 + d * (1.0f / 720)))));
    return p * d + (exp_(log_q) - p);
}

// grid: (rows, 1, 1), threads: 512
KERNEL(distillation_forward, 1024, IN(0, Element, student), IN(1, Element, teacher), OUT(2, float, kl),
       OUT(3, float, student_lse), OUT(4, float, teacher_lse), PARAMETERS(5, DistillationParameters, p)) {
    SHARED(float, scratch, 64);
    const index_t row = index_t(BLOCK_X) * p.stride;
    const RowParts parts = row_parts(row, p.vocab);
    const uint edge = edge_column(parts, THREAD, p.vocab);
    Exponentials sums[2] = {{LOWEST, 0.0f}, {LOWEST, 0.0f}};
    float s[8], t[8];
    for (uint chunk = THREAD; chunk < parts.chunks; chunk += THREADS) {
        load8(student, row + parts.head + 8 * chunk, 8, true, s);
        load8(teacher, row + parts.head + 8 * chunk, 8, true, t);
        sums[0] = with8(sums[0], p.scale, s);
        sums[1] = with8(sums[1], p.scale, t);
    }
    if (edge < p.vocab) {
        sums[0] = with1(sums[0], p.scale * wide(student[row + edge]));
        sums[1] = with1(sums[1], p.scale * wide(teacher[row + edge]));
    }
    const float of_student = block_lse(sums[0], scratch, THREAD, THREADS);
    const float of_teacher = block_lse(sums[1], scratch, THREAD, THREADS);
    float sum = 0.0f;
    for (uint chunk = THREAD; chunk < parts.chunks; chunk += THREADS) {
        load8(student, row + parts.head + 8 * chunk, 8, true, s);
        load8(teacher, row + parts.head + 8 * chunk, 8, true, t);
        UNROLL for (uint i = 0; i < 8; ++i)
            sum += divergence(p.scale * t[i] - of_teacher, p.scale * s[i] - of_student);
    }
    if (edge < p.vocab)
        sum += divergence(p.scale * wide(teacher[row + edge]) - of_teacher,
                          p.scale * wide(student[row + edge]) - of_student);
    sum = block_sum(sum, scratch, THREAD, THREADS);
    if (THREAD == 0) {
        kl[BLOCK_X] = sum;
        student_lse[BLOCK_X] = of_student;
        teacher_lse[BLOCK_X] = of_teacher;
    }
}

// grid: (rows, ceil(vocab / (8 * TOGETHER * threads)), 1), threads: 256
KERNEL(distillation_backward, 256, OUT(0, Element, student), IN(1, Element, teacher), IN(2, float, student_lse),
       IN(3, float, teacher_lse), IN(4, float, dloss), PARAMETERS(5, DistillationParameters, p)) {
    const index_t row = index_t(BLOCK_X) * p.stride;
    const RowParts parts = row_parts(row, p.vocab);
    const uint first = BLOCK_Y * TOGETHER * THREADS + THREAD;
    const float of_student = student_lse[BLOCK_X], of_teacher = teacher_lse[BLOCK_X];
    const float factor = (p.per_row ? dloss[BLOCK_X] : p.dloss) * p.scale;
    float s[TOGETHER][8], t[TOGETHER][8];
    UNROLL for (uint i = 0; i < TOGETHER; ++i) {
        const uint chunk = first + i * THREADS;
        if (chunk < parts.chunks) load8(student, row + parts.head + 8 * chunk, 8, true, s[i]);
        if (chunk < parts.chunks) load8(teacher, row + parts.head + 8 * chunk, 8, true, t[i]);
    }
    UNROLL for (uint i = 0; i < TOGETHER; ++i) {
        const uint chunk = first + i * THREADS;
        if (chunk >= parts.chunks) continue;
        UNROLL for (uint j = 0; j < 8; ++j)
            s[i][j] = factor * (exp_(p.scale * s[i][j] - of_student) - exp_(p.scale * t[i][j] - of_teacher));
        store8(student, row + parts.head + 8 * chunk, 8, true, s[i]);
    }
    const uint edge = BLOCK_Y == 0 ? edge_column(parts, THREAD, p.vocab) : p.vocab;
    if (edge < p.vocab) {
        const float q = exp_(p.scale * wide(student[row + edge]) - of_student);
        student[row + edge] = narrow(factor * (q - exp_(p.scale * wide(teacher[row + edge]) - of_teacher)));
    }
    if (BLOCK_Y > 0) return;
    for (uint column = p.vocab + THREAD; column < p.stride; column += THREADS) student[row + column] = narrow(0.0f);
}
