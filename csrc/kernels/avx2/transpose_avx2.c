/* Rows of a matrix to lanes, 8 x 8 at a time, and back, 16 x 16 at a time; in registers. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"
#include "kernels/columns.h"

static inline __attribute__((always_inline)) void
transpose(__m256 *x)
{
    __m256 y[8];
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) { /* pairs of rows, then fours, then all eight */
        y[i] = _mm256_unpacklo_ps(x[i], x[i + 1]);
        y[i + 1] = _mm256_unpackhi_ps(x[i], x[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        x[i] = _mm256_shuffle_ps(y[i], y[i + 2], 0x44);
        x[i + 1] = _mm256_shuffle_ps(y[i], y[i + 2], 0xee);
        x[i + 2] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0x44);
        x[i + 3] = _mm256_shuffle_ps(y[i + 1], y[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m256 low = _mm256_permute2f128_ps(x[i], x[i + 4], 0x20);
        x[i + 4] = _mm256_permute2f128_ps(x[i], x[i + 4], 0x31);
        x[i] = low;
    }
}

void
lbq_to_lanes_f32_avx2(const float *w, ptrdiff_t stride, ptrdiff_t rows, const int64_t *columns,
                      const int64_t *place, ptrdiff_t count, float *lanes)
{
    const __m256i ahead = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    for (ptrdiff_t i = 0; i < count; i += 8) {
        const ptrdiff_t left = count - i < 8 ? count - i : 8, first = columns ? columns[i] : i;
        if (columns && columns[i + left - 1] - first != left - 1) {
            lbq_columns_to_lanes(w, stride, rows, columns + i, place + i, left, lanes);
            continue;
        }
        const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)left), ahead);
        for (int half = 0; half < LBQ_PANEL; half += 8) {
            __m256 x[8];
#pragma GCC unroll 8
            for (int r = 0; r < 8; r++)
                x[r] = half + r < rows ? _mm256_maskload_ps(w + (half + r) * stride + first, mask)
                                       : _mm256_setzero_ps();
            transpose(x);
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++)
                if (j < left)
                    _mm256_storeu_ps(lanes + (place ? place[i + j] : i + j) * LBQ_PANEL + half,
                                     x[j]);
        }
    }
}

/* Four such rounds transpose 16 x 16 bytes. */
static inline __attribute__((always_inline)) void
shuffle_bytes(__m128i *x)
{
    __m128i y[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm_unpacklo_epi8(x[i], x[i + 8]);
        y[2 * i + 1] = _mm_unpackhi_epi8(x[i], x[i + 8]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
        x[i] = y[i];
}

void
lbq_from_lanes_u8_avx2(const uint8_t *lanes, const int64_t *columns, const int64_t *place,
                       ptrdiff_t count, ptrdiff_t rows, ptrdiff_t stride, uint8_t *codes)
{
    for (ptrdiff_t i = 0; i < count; i += 16) {
        const ptrdiff_t left = count - i < 16 ? count - i : 16;
        if (left < 16 || columns[i + 15] - columns[i] != 15) {
            lbq_lanes_to_columns(lanes, columns + i, place + i, left, rows, stride, codes);
            continue;
        }
        __m128i x[16];
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++)
            x[j] = _mm_loadu_si128((const __m128i *)(lanes + place[i + j] * LBQ_PANEL));
#pragma GCC unroll 4
        for (int round = 0; round < 4; round++)
            shuffle_bytes(x);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++)
            if (r < rows)
                _mm_storeu_si128((__m128i *)(codes + r * stride + columns[i]), x[r]);
    }
}
