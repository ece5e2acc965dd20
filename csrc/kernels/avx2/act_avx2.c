/* Quantizes activations to int8 and interleaves their rows into tiles. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/avx2/avx2.h"

static inline float
largest_magnitude(const float *x, ptrdiff_t count)
{
    const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
    __m256i top = _mm256_setzero_si256();
    for (ptrdiff_t k = 0; k < count; k += 8) {
        const __m256i bits = _mm256_loadu_si256((const __m256i *)(x + k));
        top = _mm256_max_epi32(top, _mm256_and_si256(bits, magnitude));
    }
    __m128i most = _mm_max_epi32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0x4e));
    most = _mm_max_epi32(most, _mm_shuffle_epi32(most, 0xb1));
    return _mm_cvtss_f32(_mm_castsi128_ps(most));
}

/* A whole step; `count` is a multiple of 16. */
static inline void
quantize_step(const float *x, ptrdiff_t count, int limit, int8_t *q, float *scale, float *total)
{
    const float largest = largest_magnitude(x, count);
    if (!(largest >= 0x1p-100f && largest < INFINITY)) {
        memset(q, 0, (size_t)count);
        *scale = *total = largest < 0x1p-100f ? 0 : NAN;
        return;
    }
    const __m256 inverse = _mm256_set1_ps((float)limit / largest);
    __m256i sum = _mm256_setzero_si256();
    for (ptrdiff_t k = 0; k < count; k += 16) {
        const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), inverse));
        const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8), inverse));
        sum = _mm256_add_epi32(sum, _mm256_add_epi32(a, b));
        const __m256i pairs = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
        const __m128i bytes =
            _mm_packs_epi16(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
        _mm_storeu_si128((__m128i *)(q + k), bytes);
    }
    __m128i part = _mm_add_epi32(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
    part = _mm_add_epi32(part, _mm_shuffle_epi32(part, 0x4e));
    part = _mm_add_epi32(part, _mm_shuffle_epi32(part, 0xb1));
    *scale = largest / (float)limit;
    *total = *scale * (float)_mm_cvtsi128_si32(part);
}

void
lbq_quantize_i8_avx2(const float *x, ptrdiff_t cols, ptrdiff_t step, int limit, int8_t *q,
                     float *scale, float *total)
{
    ptrdiff_t begin = 0;
    for (; begin + step <= cols; begin += step)
        quantize_step(x + begin, step, limit, q + begin, scale++, total++);
    if (begin == cols)
        return;
    float padded[LBQ_MAX_STEP] = {0};
    memcpy(padded, x + begin, sizeof(float) * (size_t)(cols - begin));
    quantize_step(padded, step, limit, q + begin, scale, total);
}

/* Sums of 16 activations `v` for n = 0 or 1, [i][m]: a shuffle copies each to the m that have its
 * bit set and puts zeros elsewhere. */
static inline void
subset_sums(__m128i v, __m128i bias, uint8_t *sums)
{
    const __m256i values = _mm256_broadcastsi128_si256(v);
    const __m256i bit = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15));
    for (int i = 0; i < 4; i += 2) {
        __m256i sum = _mm256_broadcastsi128_si256(bias);
        for (int j = 0; j < 4; j++) {
            const __m256i mask = _mm256_set1_epi8((char)(1 << j));
            const __m256i has = _mm256_cmpeq_epi8(_mm256_and_si256(bit, mask), mask);
            const __m256i from = _mm256_set_m128i(_mm_set1_epi8((char)(4 * j + i + 1)),
                                                  _mm_set1_epi8((char)(4 * j + i)));
            sum = _mm256_add_epi8(sum, _mm256_and_si256(has, _mm256_shuffle_epi8(values, from)));
        }
        _mm256_storeu_si256((__m256i *)(sums + 16 * i), sum);
    }
}

void
lbq_subset_sums_avx2(const int8_t *q, ptrdiff_t columns, uint8_t *sums)
{
    const __m128i nibble = _mm_set1_epi8(15), eight = _mm_set1_epi8(8);
    for (ptrdiff_t k = 0; k < columns; k += 32, sums += 256)
        for (int n = 0; n < 2; n++) {
            const __m128i v = _mm_loadu_si128((const __m128i *)(q + k + 16 * n));
            const __m128i bits = _mm_and_si128(_mm_srli_epi16(v, 4), nibble);
            const __m128i high = _mm_sub_epi8(_mm_xor_si128(bits, eight), eight);
            subset_sums(_mm_and_si128(v, nibble), _mm_setzero_si128(), sums + 64 * n);
            subset_sums(high, _mm_set1_epi8(32), sums + 128 + 64 * n);
        }
}

/* Transposes eight words from each of eight tokens. */
static inline void
interleave_words(const int8_t *q, ptrdiff_t columns, int8_t *values)
{
    __m256 row[8], pair[8];
    for (int t = 0; t < 8; t++)
        row[t] = _mm256_loadu_ps((const float *)(const void *)(q + t * columns));
    for (int t = 0; t < 8; t += 2) {
        pair[t] = _mm256_unpacklo_ps(row[t], row[t + 1]);
        pair[t + 1] = _mm256_unpackhi_ps(row[t], row[t + 1]);
    }
    for (int t = 0; t < 8; t += 4) {
        row[t] = _mm256_shuffle_ps(pair[t], pair[t + 2], 0x44);
        row[t + 1] = _mm256_shuffle_ps(pair[t], pair[t + 2], 0xee);
        row[t + 2] = _mm256_shuffle_ps(pair[t + 1], pair[t + 3], 0x44);
        row[t + 3] = _mm256_shuffle_ps(pair[t + 1], pair[t + 3], 0xee);
    }
    float *const out = (float *)(void *)values;
    for (int t = 0; t < 4; t++) {
        _mm256_storeu_ps(out + 8 * t, _mm256_permute2f128_ps(row[t], row[t + 4], 0x20));
        _mm256_storeu_ps(out + 8 * t + 32, _mm256_permute2f128_ps(row[t], row[t + 4], 0x31));
    }
}

void
lbq_interleave_avx2(const int8_t *q, ptrdiff_t columns, ptrdiff_t width, int8_t *values)
{
    if (width == 1) {
        memcpy(values, q, (size_t)columns);
        return;
    }
    ptrdiff_t k = 0;
    for (; width == LBQ_TILE && k + 32 <= columns; k += 32)
        interleave_words(q + k, columns, values + k * width);
    for (; k < columns; k += 4)
        for (ptrdiff_t t = 0; t < width; t++)
            memcpy(values + k * width + 4 * t, q + t * columns + k, 4);
}
