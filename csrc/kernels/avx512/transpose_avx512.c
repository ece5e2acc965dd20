/* Columns to lanes: 16 adjacent columns of 16 rows at a time, in registers. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/lanes_avx512.h"
#include "kernels/columns.h"

static inline __attribute__((always_inline)) void
transpose(__m512 *x)
{
    __m512 pairs[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) { /* of rows i and i + 1, then of four rows */
        const int other = i % 2 ? i - 1 : i + 1;
        pairs[i] = i % 2 ? _mm512_unpackhi_ps(x[other], x[i]) : _mm512_unpacklo_ps(x[i], x[other]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
        x[i + 1] = _mm512_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
        x[i + 2] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
        x[i + 3] = _mm512_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* quarters of columns i, i + 4, i + 8, i + 12 */
        const __m512 a = _mm512_shuffle_f32x4(x[i], x[i + 4], 0x44);
        const __m512 b = _mm512_shuffle_f32x4(x[i], x[i + 4], 0xee);
        const __m512 c = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0x44);
        const __m512 d = _mm512_shuffle_f32x4(x[i + 8], x[i + 12], 0xee);
        x[i] = _mm512_shuffle_f32x4(a, c, 0x88);
        x[i + 4] = _mm512_shuffle_f32x4(a, c, 0xdd);
        x[i + 8] = _mm512_shuffle_f32x4(b, d, 0x88);
        x[i + 12] = _mm512_shuffle_f32x4(b, d, 0xdd);
    }
}

void
lbq_to_lanes_f32_avx512(const float *w, ptrdiff_t stride, ptrdiff_t rows, const int64_t *columns,
                        const int64_t *place, ptrdiff_t count, float *lanes)
{
    for (ptrdiff_t i = 0; i < count; i += 16) {
        const ptrdiff_t left = count - i < 16 ? count - i : 16, first = columns ? columns[i] : i;
        if (columns && columns[i + left - 1] - first != left - 1) {
            lbq_columns_to_lanes(w, stride, rows, columns + i, place + i, left, lanes);
            continue;
        }
        const __mmask16 mask = lbq_lanes_avx512(left);
        __m512 x[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            x[r] = _mm512_maskz_loadu_ps(r < rows ? mask : 0, w + r * stride + first);
        transpose(x);
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++)
            if (j < left)
                _mm512_storeu_ps(lanes + (place ? place[i + j] : i + j) * LBQ_PANEL, x[j]);
    }
}
