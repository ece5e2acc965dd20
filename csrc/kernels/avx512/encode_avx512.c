/* Ranges and codes of the rows of a panel: vectors along a row, four rows joined at a time. */
#include <immintrin.h>
#include <math.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/lanes_avx512.h"

/* From vectors a, b, c, d of four rows one that holds in every 128 bits an extreme of each; from
 * four of those, one that holds the extremes of all sixteen rows. */
#define DEFINE_JOIN(name)                                                                          \
    static inline __m512 name##_of_four(const __m512 *row)                                         \
    {                                                                                              \
        const __m512 ab = _mm512_##name##_ps(_mm512_unpacklo_ps(row[0], row[1]),                   \
                                             _mm512_unpackhi_ps(row[0], row[1]));                  \
        const __m512 cd = _mm512_##name##_ps(_mm512_unpacklo_ps(row[2], row[3]),                   \
                                             _mm512_unpackhi_ps(row[2], row[3]));                  \
        return _mm512_##name##_ps(_mm512_shuffle_ps(ab, cd, 0x44),                                 \
                                  _mm512_shuffle_ps(ab, cd, 0xee));                                \
    }                                                                                              \
    static inline __m512 name##_of_lanes(const __m512 *four)                                       \
    {                                                                                              \
        const __m512 ab = _mm512_##name##_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x44),         \
                                             _mm512_shuffle_f32x4(four[0], four[1], 0xee));        \
        const __m512 cd = _mm512_##name##_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x44),         \
                                             _mm512_shuffle_f32x4(four[2], four[3], 0xee));        \
        return _mm512_##name##_ps(_mm512_shuffle_f32x4(ab, cd, 0x88),                              \
                                  _mm512_shuffle_f32x4(ab, cd, 0xdd));                             \
    }
DEFINE_JOIN(min)
DEFINE_JOIN(max)

/* The least, the most and NaN, unless all are finite, of the next numbers of four rows. */
typedef struct {
    __m512 least[4], most[4], nothing[4];
} extremes;

static inline __attribute__((always_inline)) void
look(const float *const *row, ptrdiff_t k, __mmask16 mask, extremes *e)
{
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512 x = mask == 0xffff ? _mm512_loadu_ps(row[i] + k)
                                  : _mm512_mask_loadu_ps(e->least[i], mask, row[i] + k);
        __asm__("" : "+v"(x)); /* else gcc loads it three times */
        e->least[i] = _mm512_min_ps(e->least[i], x);
        e->most[i] = _mm512_max_ps(e->most[i], x);
        e->nothing[i] = _mm512_fmadd_ps(x, _mm512_setzero_ps(), e->nothing[i]);
    }
}

int
lbq_range_f32_avx512(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count, float limit,
                     float *low, float *high)
{
    const __m512 zero = _mm512_setzero_ps();
    const ptrdiff_t whole = count / 16 * 16;
    __m512 least[4], most[4], nothing = zero;
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
        const float *row[4];
        extremes e;
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            row[i] = w + (4 * q + i < rows ? 4 * q + i : rows - 1) * stride;
            e.least[i] = e.most[i] = _mm512_set1_ps(row[i][0]);
            e.nothing[i] = zero;
        }
        for (ptrdiff_t k = 0; k < whole; k += 16)
            look(row, k, 0xffff, &e);
        if (whole < count)
            look(row, whole, lbq_lanes_avx512(count - whole), &e);
        least[q] = min_of_four(e.least);
        most[q] = max_of_four(e.most);
        nothing = _mm512_add_ps(nothing,
                                _mm512_add_ps(_mm512_add_ps(e.nothing[0], e.nothing[1]),
                                              _mm512_add_ps(e.nothing[2], e.nothing[3])));
    }
    const __m512 bottom = min_of_lanes(least), top = max_of_lanes(most);
    _mm512_storeu_ps(low, bottom);
    _mm512_storeu_ps(high, top);
    const __mmask16 above = _mm512_cmp_ps_mask(bottom, _mm512_set1_ps(-limit), _CMP_GE_OQ);
    const __mmask16 below = _mm512_cmp_ps_mask(top, _mm512_set1_ps(limit), _CMP_LE_OQ);
    return (above & below & _mm512_cmp_ps_mask(nothing, zero, _CMP_EQ_OQ)) == 0xffff;
}

static inline __m512i
encode(const float *w, const float *grid, __m512 top)
{
    const __m512 offset = _mm512_set1_ps(grid[0]), inverse = _mm512_set1_ps(grid[LBQ_PANEL]);
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(w), offset), inverse);
    return _mm512_cvtps_epi32(_mm512_min_ps(x, top)); /* packing saturates what is negative */
}

/* Sixteen columns. */
static inline __attribute__((always_inline)) void
encode_block(const float *w, ptrdiff_t stride, const float *grid, __m512 top, uint8_t *codes)
{
    __m512i four[4]; /* in 128 bits: four columns of four rows */
#pragma GCC unroll 4
    for (int q = 0; q < 4; q++) {
        const float *const row = w + 4 * q * stride;
        const __m512i ab = _mm512_packus_epi32(encode(row, grid + 4 * q, top),
                                               encode(row + stride, grid + 4 * q + 1, top));
        const __m512i cd = _mm512_packus_epi32(encode(row + 2 * stride, grid + 4 * q + 2, top),
                                               encode(row + 3 * stride, grid + 4 * q + 3, top));
        four[q] = _mm512_packus_epi16(ab, cd);
    }
    const __m512i a = _mm512_shuffle_i32x4(four[0], four[1], 0x44);
    const __m512i b = _mm512_shuffle_i32x4(four[2], four[3], 0x44);
    const __m512i c = _mm512_shuffle_i32x4(four[0], four[1], 0xee);
    const __m512i d = _mm512_shuffle_i32x4(four[2], four[3], 0xee);
    _mm512_storeu_si512(codes, _mm512_shuffle_i32x4(a, b, 0x88));
    _mm512_storeu_si512(codes + 64, _mm512_shuffle_i32x4(a, b, 0xdd));
    _mm512_storeu_si512(codes + 128, _mm512_shuffle_i32x4(c, d, 0x88));
    _mm512_storeu_si512(codes + 192, _mm512_shuffle_i32x4(c, d, 0xdd));
}

void
lbq_encode_f32_avx512(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count,
                      const float *grid, int top, uint8_t *codes)
{
    const __m512 limit = _mm512_set1_ps((float)top), least = _mm512_set1_ps(-HUGE_VALF);
    for (ptrdiff_t k = 0; k < count; k += 16, codes += 16 * LBQ_PANEL) {
        if (rows == LBQ_PANEL && k + 16 <= count) {
            encode_block(w + k, stride, grid, limit, codes);
            continue;
        }
        float padded[LBQ_PANEL * 16];
        for (ptrdiff_t r = 0; r < LBQ_PANEL; r++) {
            const __mmask16 mask = r < rows ? lbq_lanes_avx512(count - k) : 0;
            const float *const row = w + (r < rows ? r : 0) * stride + k;
            _mm512_storeu_ps(padded + r * 16, _mm512_mask_loadu_ps(least, mask, row));
        }
        encode_block(padded, 16, grid, limit, codes);
    }
}
