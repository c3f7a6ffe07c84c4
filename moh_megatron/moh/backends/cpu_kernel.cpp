// Causal attention of ragged queries on one CPU thread: forward with an online softmax, backward from its log-sum-exp.
//
// A list holds the active queries of one KV group, sorted by position. Row i sees the keys first[i] .. last[i], both
// bounds non-decreasing in i. Queries are scaled already. All matrices are row-major fp32: q, out, their gradients [rows, H];
// k, v, their gradients [S, H]; lse and delta [rows].
//
// It includes no headers of torch, so that it compiles in a second; matrix products use torch's own BLAS.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

extern "C" void sgemm_(const char*, const char*, const int*, const int*, const int*, const float*, const float*,
                       const int*, const float*, const int*, const float*, float*, const int*);

namespace {

constexpr int64_t kQueries = 128; // rows of a block
constexpr int64_t kKeys = 128;    // keys of a block

// c [m, n] = a [m, k] times b, plus beta c. BLAS is column-major: it computes the transposed product.
void multiply(bool transpose_a, bool transpose_b, int m, int n, int k, const float* a, int lda, const float* b, int ldb,
              float beta, float* c, int ldc) {
    const char ta = transpose_a ? 'T' : 'N', tb = transpose_b ? 'T' : 'N';
    const float one = 1.0f;
    sgemm_(&tb, &ta, &n, &m, &k, &one, b, &ldb, a, &lda, &beta, c, &ldc);
}

// exp(x) for x <= 0, relative error near 1e-7: 2^n times a polynomial in the remainder, in a form compilers vectorise.
inline float exponential(float x) {
    x = std::max(x, -87.0f);
    const float n = __builtin_rintf(x * 1.44269504088896341f);
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return p * scale;
}

// The rows of [a, e) that see any key of [start, stop): both bounds rise with the row, so the rows are contiguous.
struct Rows {
    int64_t begin, end;
    Rows(const int64_t* first, const int64_t* last, int64_t a, int64_t e, int64_t start, int64_t stop)
        : begin(std::lower_bound(last + a, last + e, start) - last),
          end(std::lower_bound(first + begin, first + e, stop) - first) {}
    int count() const { return static_cast<int>(end - begin); }
};

// The columns of a block of keys [start, start + width) that a row may see, relative to start.
struct Seen {
    int64_t begin, end;
    Seen(int64_t first, int64_t last, int64_t start, int64_t width)
        : begin(std::clamp<int64_t>(first - start, 0, width)), end(std::clamp<int64_t>(last + 1 - start, begin, width)) {}
};

void clear_outside(float* row, Seen seen, int64_t width) {
    std::fill(row, row + seen.begin, 0.0f);
    std::fill(row + seen.end, row + width, 0.0f);
}

// Row of scores -> row of exp(score - maximum), zero outside; returns the sum.
float exponentiate(float* row, Seen seen, int64_t width, float maximum) {
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = seen.begin; c < seen.end; ++c) {
        row[c] = exponential(row[c] - maximum);
        sum += row[c];
    }
    clear_outside(row, seen, width);
    return sum;
}

float largest(const float* row, Seen seen) {
    float value = -std::numeric_limits<float>::max();
#pragma omp simd reduction(max : value)
    for (int64_t c = seen.begin; c < seen.end; ++c) value = std::max(value, row[c]);
    return value;
}

void scale_row(float* row, int64_t size, float factor) {
#pragma omp simd
    for (int64_t c = 0; c < size; ++c) row[c] *= factor;
}

}  // namespace

extern "C" {

void moh_ragged_forward(const float* q, const float* k, const float* v, const int64_t* first, const int64_t* last,
                        int64_t rows, int64_t size, float* out, float* lse) {
    std::vector<float> scores(kQueries * kKeys), maximum(kQueries), sum(kQueries);
    for (int64_t a = 0; a < rows; a += kQueries) {
        const int64_t e = std::min(rows, a + kQueries);
        std::fill(maximum.begin(), maximum.end(), -std::numeric_limits<float>::max());
        std::fill(sum.begin(), sum.end(), 0.0f);
        std::fill(out + a * size, out + e * size, 0.0f);
        for (int64_t j = first[a]; j <= last[e - 1]; j += kKeys) {
            const int64_t w = std::min(kKeys, last[e - 1] + 1 - j);
            const Rows see(first, last, a, e, j, j + w);
            float *out_block = out + see.begin * size;
            multiply(false, true, see.count(), w, size, q + see.begin * size, size, k + j * size, size, 0.0f,
                     scores.data(), kKeys);
            for (int64_t i = see.begin; i < see.end; ++i) {
                float* row = scores.data() + (i - see.begin) * kKeys;
                float &row_maximum = maximum[i - a], &row_sum = sum[i - a];
                const Seen seen(first[i], last[i], j, w);
                const float highest = std::max(row_maximum, largest(row, seen));
                const float decay = row_sum > 0.0f ? exponential(row_maximum - highest) : 0.0f;
                row_sum = row_sum * decay + exponentiate(row, seen, w, highest);
                if (decay != 1.0f) scale_row(out + i * size, size, decay);
                row_maximum = highest;
            }
            multiply(false, false, see.count(), size, w, scores.data(), kKeys, v + j * size, size, 1.0f, out_block,
                     size);
        }
        for (int64_t i = a; i < e; ++i) {
            scale_row(out + i * size, size, 1.0f / sum[i - a]);
            lse[i] = maximum[i - a] + std::log(sum[i - a]);
        }
    }
}

// Adds to dq, dk and dv; delta is the row sum of d_out times out.
void moh_ragged_backward(const float* d_out, const float* q, const float* k, const float* v, const int64_t* first,
                         const int64_t* last, const float* lse, const float* delta, int64_t rows, int64_t size,
                         float* dq, float* dk, float* dv) {
    std::vector<float> probability(kQueries * kKeys), d_scores(kQueries * kKeys);
    for (int64_t a = 0; a < rows; a += kQueries) {
        const int64_t e = std::min(rows, a + kQueries);
        for (int64_t j = first[a]; j <= last[e - 1]; j += kKeys) {
            const int64_t w = std::min(kKeys, last[e - 1] + 1 - j);
            const Rows see(first, last, a, e, j, j + w);
            const int m = see.count();
            const float *q_block = q + see.begin * size, *d_block = d_out + see.begin * size;
            multiply(false, true, m, w, size, q_block, size, k + j * size, size, 0.0f, probability.data(), kKeys);
            multiply(false, true, m, w, size, d_block, size, v + j * size, size, 0.0f, d_scores.data(), kKeys);
            for (int64_t i = see.begin; i < see.end; ++i) {
                const int64_t offset = (i - see.begin) * kKeys;
                float *p = probability.data() + offset, *d = d_scores.data() + offset;
                const Seen seen(first[i], last[i], j, w);
                const float log_sum = lse[i], row_delta = delta[i];
#pragma omp simd
                for (int64_t c = seen.begin; c < seen.end; ++c) {
                    p[c] = exponential(std::min(p[c] - log_sum, 0.0f));
                    d[c] = p[c] * (d[c] - row_delta);
                }
                clear_outside(p, seen, w);
                clear_outside(d, seen, w);
            }
            multiply(true, false, w, size, m, probability.data(), kKeys, d_block, size, 1.0f, dv + j * size, size);
            multiply(true, false, w, size, m, d_scores.data(), kKeys, q_block, size, 1.0f, dk + j * size, size);
            multiply(false, false, m, size, w, d_scores.data(), kKeys, k + j * size, size, 1.0f, dq + see.begin * size,
                     size);
        }
    }
}

}  // extern "C"
