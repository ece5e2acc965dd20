/* GPTQ's error feedback and rounding, sixteen rows in two vectors; moves of coordinate descent. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"

/* `columns` sums of sixteen rows, all in registers; without fma, to round as portable C does. */
static inline __attribute__((always_inline)) void
add_columns(const int columns, ptrdiff_t count, const float *R, ptrdiff_t stride, const float *e,
            ptrdiff_t pitch, float *sum)
{
    __m256 low[4], high[4];
#pragma GCC unroll 4
    for (int j = 0; j < columns; j++) {
        low[j] = _mm256_loadu_ps(sum + j * pitch);
        high[j] = _mm256_loadu_ps(sum + j * pitch + 8);
    }
    for (ptrdiff_t i = 0; i < count; i++) {
        const __m256 a = _mm256_loadu_ps(e + i * pitch), b = _mm256_loadu_ps(e + i * pitch + 8);
#pragma GCC unroll 4
        for (int j = 0; j < columns; j++) {
            const __m256 r = _mm256_broadcast_ss(R + i * stride + j);
            low[j] = _mm256_add_ps(low[j], _mm256_mul_ps(r, a));
            high[j] = _mm256_add_ps(high[j], _mm256_mul_ps(r, b));
        }
    }
#pragma GCC unroll 4
    for (int j = 0; j < columns; j++) {
        _mm256_storeu_ps(sum + j * pitch, low[j]);
        _mm256_storeu_ps(sum + j * pitch + 8, high[j]);
    }
}

void
lbq_feedback_f32_avx2(ptrdiff_t count, ptrdiff_t width, const float *R, ptrdiff_t stride,
                      const float *e, ptrdiff_t pitch, float *sum)
{
    ptrdiff_t j = 0;
    for (; j + 4 <= width; j += 4)
        add_columns(4, count, R + j, stride, e, pitch, sum + j * pitch);
    for (; j < width; j++)
        add_columns(1, count, R + j, stride, e, pitch, sum + j * pitch);
}

/* `columns` of them, starting at `first`, for eight rows, all in registers. */
static inline __attribute__((always_inline)) void
solve_columns(const int columns, ptrdiff_t first, const float *R, ptrdiff_t stride, float *x)
{
    __m256 total[8];
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++)
        total[j] = _mm256_loadu_ps(x + (first + j) * LBQ_PANEL);
    for (ptrdiff_t i = 0; i < first; i++) {
        const __m256 solved = _mm256_loadu_ps(x + i * LBQ_PANEL);
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) {
            const __m256 r = _mm256_broadcast_ss(R + i * stride + first + j);
            total[j] = _mm256_sub_ps(total[j], _mm256_mul_ps(r, solved));
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < columns; i++) {
#pragma GCC unroll 8
        for (int j = i + 1; j < columns; j++) {
            const __m256 r = _mm256_broadcast_ss(R + (first + i) * stride + first + j);
            total[j] = _mm256_sub_ps(total[j], _mm256_mul_ps(r, total[i]));
        }
        _mm256_storeu_ps(x + (first + i) * LBQ_PANEL, total[i]);
    }
}

void
lbq_solve_f32_avx2(ptrdiff_t count, const float *R, ptrdiff_t stride, float *x)
{
    for (int l = 0; l < LBQ_PANEL; l += 8) {
        ptrdiff_t j = 0;
        for (; j + 8 <= count; j += 8)
            solve_columns(8, j, R, stride, x + l);
        for (; j < count; j++)
            solve_columns(1, j, R, stride, x + l);
    }
}

void
lbq_round_f32_avx2(const float *grid, int top, const float *w, const float *shift, uint8_t *codes,
                   float *e)
{
    const __m256 limit = _mm256_set1_ps((float)top);
    __m256i code[2];
    for (int l = 0; l < 16; l += 8) {
        const __m256 weight = _mm256_loadu_ps(w + l), offset = _mm256_loadu_ps(grid + 16 + l);
        __m256 x = _mm256_sub_ps(_mm256_add_ps(weight, _mm256_loadu_ps(shift + l)), offset);
        x = _mm256_mul_ps(x, _mm256_loadu_ps(grid + 32 + l));
        x = _mm256_min_ps(_mm256_max_ps(x, _mm256_setzero_ps()), limit);
        code[l / 8] = _mm256_cvtps_epi32(x);
        const __m256 level = _mm256_cvtepi32_ps(code[l / 8]);
        const __m256 value = _mm256_mul_ps(_mm256_loadu_ps(grid + l), level);
        _mm256_storeu_ps(e + l, _mm256_sub_ps(weight, _mm256_add_ps(value, offset)));
    }
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(code[0], code[1]), 0xd8);
    const __m128i bytes =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128((__m128i *)codes, bytes);
}

/* 8 * `vectors` sums, all in registers. */
static inline __attribute__((always_inline)) void
add_rows(const int vectors, ptrdiff_t count, const int32_t *row, const float *factor,
         const float *matrix, ptrdiff_t stride, float *y)
{
    __m256 total[8];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++)
        total[v] = _mm256_loadu_ps(y + 8 * v);
    for (ptrdiff_t i = 0; i < count; i++) {
        const __m256 f = _mm256_broadcast_ss(factor + i);
        const float *const from = matrix + row[i] * stride;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++)
            total[v] = _mm256_fmadd_ps(f, _mm256_loadu_ps(from + 8 * v), total[v]);
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++)
        _mm256_storeu_ps(y + 8 * v, total[v]);
}

void
lbq_add_rows_f32_avx2(ptrdiff_t count, const int32_t *row, const float *factor, const float *matrix,
                      ptrdiff_t stride, ptrdiff_t width, float *y)
{
    ptrdiff_t c = 0;
    for (; c + 64 <= width; c += 64)
        add_rows(8, count, row, factor, matrix + c, stride, y + c);
    for (; c + 8 <= width; c += 8)
        add_rows(1, count, row, factor, matrix + c, stride, y + c);
    for (ptrdiff_t i = 0; i < count; i++)
        for (ptrdiff_t last = c; last < width; last++)
            y[last] += factor[i] * matrix[row[i] * stride + last];
}
