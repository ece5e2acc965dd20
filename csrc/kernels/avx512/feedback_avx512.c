/* GPTQ's error feedback and rounding, sixteen rows in a vector; moves of coordinate descent. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/lanes_avx512.h"

/* `columns` sums of sixteen rows, all in registers; without fma, to round as portable C does. */
static inline __attribute__((always_inline)) void
add_columns(const int columns, ptrdiff_t count, const float *R, ptrdiff_t stride, const float *e,
            ptrdiff_t pitch, float *sum)
{
    __m512 total[8];
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++)
        total[j] = _mm512_loadu_ps(sum + j * pitch);
    for (ptrdiff_t i = 0; i < count; i++) {
        const __m512 error = _mm512_loadu_ps(e + i * pitch);
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) {
            const __m512 r = _mm512_set1_ps(R[i * stride + j]);
            total[j] = _mm512_add_ps(total[j], _mm512_mul_ps(r, error));
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++)
        _mm512_storeu_ps(sum + j * pitch, total[j]);
}

void
lbq_feedback_f32_avx512(ptrdiff_t count, ptrdiff_t width, const float *R, ptrdiff_t stride,
                        const float *e, ptrdiff_t pitch, float *sum)
{
    ptrdiff_t j = 0;
    for (; j + 8 <= width; j += 8)
        add_columns(8, count, R + j, stride, e, pitch, sum + j * pitch);
    for (; j + 2 <= width; j += 2)
        add_columns(2, count, R + j, stride, e, pitch, sum + j * pitch);
    if (j < width)
        add_columns(1, count, R + j, stride, e, pitch, sum + j * pitch);
}

/* `columns` of them, starting at `first`, all in registers. */
static inline __attribute__((always_inline)) void
solve_columns(const int columns, ptrdiff_t first, const float *R, ptrdiff_t stride, float *x)
{
    __m512 total[8];
#pragma GCC unroll 8
    for (int j = 0; j < columns; j++)
        total[j] = _mm512_loadu_ps(x + (first + j) * LBQ_PANEL);
    for (ptrdiff_t i = 0; i < first; i++) {
        const __m512 solved = _mm512_loadu_ps(x + i * LBQ_PANEL);
#pragma GCC unroll 8
        for (int j = 0; j < columns; j++) {
            const __m512 r = _mm512_set1_ps(R[i * stride + first + j]);
            total[j] = _mm512_sub_ps(total[j], _mm512_mul_ps(r, solved));
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < columns; i++) {
#pragma GCC unroll 8
        for (int j = i + 1; j < columns; j++) {
            const __m512 r = _mm512_set1_ps(R[(first + i) * stride + first + j]);
            total[j] = _mm512_sub_ps(total[j], _mm512_mul_ps(r, total[i]));
        }
        _mm512_storeu_ps(x + (first + i) * LBQ_PANEL, total[i]);
    }
}

void
lbq_solve_f32_avx512(ptrdiff_t count, const float *R, ptrdiff_t stride, float *x)
{
    ptrdiff_t j = 0;
    for (; j + 8 <= count; j += 8)
        solve_columns(8, j, R, stride, x);
    for (; j < count; j++)
        solve_columns(1, j, R, stride, x);
}

void
lbq_round_f32_avx512(const float *grid, int top, const float *w, const float *shift, uint8_t *codes,
                     float *e)
{
    const __m512 weight = _mm512_loadu_ps(w), offset = _mm512_loadu_ps(grid + 16);
    __m512 x = _mm512_sub_ps(_mm512_add_ps(weight, _mm512_loadu_ps(shift)), offset);
    x = _mm512_mul_ps(x, _mm512_loadu_ps(grid + 32));
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_setzero_ps()), _mm512_set1_ps((float)top));
    const __m512i code = _mm512_cvtps_epi32(x);
    _mm_storeu_si128((__m128i *)codes, _mm512_cvtepi32_epi8(code));
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(grid), _mm512_cvtepi32_ps(code));
    _mm512_storeu_ps(e, _mm512_sub_ps(weight, _mm512_add_ps(value, offset)));
}

/* 16 * `vectors` sums, all in registers; the last vector is masked. */
static inline __attribute__((always_inline)) void
add_rows(const int vectors, __mmask16 mask, ptrdiff_t count, const int32_t *row,
         const float *factor, const float *matrix, ptrdiff_t stride, float *y)
{
    __m512 total[8];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++)
        total[v] = _mm512_maskz_loadu_ps(v < vectors - 1 ? 0xffff : mask, y + 16 * v);
    for (ptrdiff_t i = 0; i < count; i++) {
        const __m512 f = _mm512_set1_ps(factor[i]);
        const float *const from = matrix + row[i] * stride;
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            const __m512 x = _mm512_maskz_loadu_ps(v < vectors - 1 ? 0xffff : mask, from + 16 * v);
            total[v] = _mm512_fmadd_ps(f, x, total[v]);
        }
    }
#pragma GCC unroll 8
    for (int v = 0; v < vectors; v++)
        _mm512_mask_storeu_ps(y + 16 * v, v < vectors - 1 ? 0xffff : mask, total[v]);
}

void
lbq_add_rows_f32_avx512(ptrdiff_t count, const int32_t *row, const float *factor,
                        const float *matrix, ptrdiff_t stride, ptrdiff_t width, float *y)
{
    ptrdiff_t c = 0;
    for (; c + 128 <= width; c += 128)
        add_rows(8, 0xffff, count, row, factor, matrix + c, stride, y + c);
    for (; c < width; c += 16)
        add_rows(1, lbq_lanes_avx512(width - c), count, row, factor, matrix + c, stride, y + c);
}
