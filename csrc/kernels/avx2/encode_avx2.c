/* Ranges and codes of the rows of a panel: vectors along a row, four rows joined at a time. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/avx2/avx2.h"

/* From vectors of eight rows one that holds an extreme of each. */
#define DEFINE_JOIN(name)                                                                          \
    static inline __m256 name##_of_four(const __m256 *row)                                         \
    {                                                                                              \
        const __m256 ab = _mm256_##name##_ps(_mm256_unpacklo_ps(row[0], row[1]),                   \
                                             _mm256_unpackhi_ps(row[0], row[1]));                  \
        const __m256 cd = _mm256_##name##_ps(_mm256_unpacklo_ps(row[2], row[3]),                   \
                                             _mm256_unpackhi_ps(row[2], row[3]));                  \
        return _mm256_##name##_ps(_mm256_shuffle_ps(ab, cd, 0x44),                                 \
                                  _mm256_shuffle_ps(ab, cd, 0xee));                                \
    }                                                                                              \
    static inline __m256 name##_of_eight(const __m256 *row)                                        \
    {                                                                                              \
        const __m256 a = name##_of_four(row), b = name##_of_four(row + 4);                         \
        return _mm256_##name##_ps(_mm256_permute2f128_ps(a, b, 0x20),                              \
                                  _mm256_permute2f128_ps(a, b, 0x31));                             \
    }
DEFINE_JOIN(min)
DEFINE_JOIN(max)

int
lbq_range_f32_avx2(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count, float limit,
                   float *low, float *high)
{
    const __m256 zero = _mm256_setzero_ps();
    const ptrdiff_t whole = count / 8 * 8;
    __m256 nothing = zero; /* NaN if something is not finite */
    __m256 within = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
    for (int first = 0; first < LBQ_PANEL; first += 8) {
        __m256 bottom[8], top[8];
        for (int i = 0; i < 8; i++) {
            const float *const row = w + (first + i < rows ? first + i : rows - 1) * stride;
            __m256 least = _mm256_set1_ps(row[0]), most = least;
            for (ptrdiff_t k = 0; k < count; k += 8) {
                float rest[8];
                const float *at = row + k;
                if (k == whole) {
                    _mm256_storeu_ps(rest, least);
                    memcpy(rest, at, (size_t)(count - k) * sizeof *at);
                    at = rest;
                }
                const __m256 x = _mm256_loadu_ps(at);
                least = _mm256_min_ps(least, x);
                most = _mm256_max_ps(most, x);
                nothing = _mm256_fmadd_ps(x, zero, nothing);
            }
            bottom[i] = least;
            top[i] = most;
        }
        const __m256 lowest = min_of_eight(bottom), highest = max_of_eight(top);
        _mm256_storeu_ps(low + first, lowest);
        _mm256_storeu_ps(high + first, highest);
        const __m256 above = _mm256_cmp_ps(lowest, _mm256_set1_ps(-limit), _CMP_GE_OQ);
        const __m256 below = _mm256_cmp_ps(highest, _mm256_set1_ps(limit), _CMP_LE_OQ);
        within = _mm256_and_ps(within, _mm256_and_ps(above, below));
    }
    within = _mm256_and_ps(within, _mm256_cmp_ps(nothing, zero, _CMP_EQ_OQ));
    return _mm256_movemask_ps(within) == 0xff;
}

static inline __m256i
encode(const float *w, const float *grid, __m256 top)
{
    const __m256 offset = _mm256_set1_ps(grid[0]), inverse = _mm256_set1_ps(grid[LBQ_PANEL]);
    const __m256 x = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w), offset), inverse);
    return _mm256_cvtps_epi32(_mm256_min_ps(x, top)); /* packing saturates what is negative */
}

/* Eight columns of four rows, four of them in each half. */
static inline __m256i
encode_four(const float *w, ptrdiff_t stride, const float *grid, __m256 top)
{
    const __m256i ab = _mm256_packus_epi32(encode(w, grid, top), encode(w + stride, grid + 1, top));
    const __m256i cd = _mm256_packus_epi32(encode(w + 2 * stride, grid + 2, top),
                                           encode(w + 3 * stride, grid + 3, top));
    return _mm256_packus_epi16(ab, cd);
}

/* Sixteen columns. */
static inline void
encode_block(const float *w, ptrdiff_t stride, const float *grid, __m256 top, uint8_t *codes)
{
    for (int r = 0; r < LBQ_PANEL; r += 4)
        for (int k = 0; k < 16; k += 8) {
            const __m256i four = encode_four(w + r * stride + k, stride, grid + r, top);
            uint8_t *const to = codes + k * LBQ_PANEL + 4 * r;
            _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(four));
            _mm_storeu_si128((__m128i *)(to + 64), _mm256_extracti128_si256(four, 1));
        }
}

void
lbq_encode_f32_avx2(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count,
                    const float *grid, int top, uint8_t *codes)
{
    const __m256 limit = _mm256_set1_ps((float)top);
    for (ptrdiff_t k = 0; k < count; k += 16, codes += 16 * LBQ_PANEL) {
        if (rows == LBQ_PANEL && k + 16 <= count) {
            encode_block(w + k, stride, grid, limit, codes);
            continue;
        }
        const ptrdiff_t columns = count - k < 16 ? count - k : 16;
        float padded[LBQ_PANEL * 16];
        for (int i = 0; i < LBQ_PANEL * 16; i++)
            padded[i] = -HUGE_VALF;
        for (ptrdiff_t r = 0; r < rows; r++)
            memcpy(padded + r * 16, w + r * stride + k, (size_t)columns * sizeof *w);
        encode_block(padded, 16, grid, limit, codes);
    }
}
