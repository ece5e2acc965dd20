/* Ranges, grids and codes of a panel's rows: vectors along a row, joined four rows at a time. */
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/avx2/avx2.h"
#include "kernels/avx2/halve_avx2.h"
#include "kernels/round.h"

/* Reduces vectors of eight rows to one that holds an extreme of each row. */
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

/* Running minimum and maximum of four rows, and the lanes where none of them had a NaN. */
typedef struct {
    __m256 least[4], most[4], numbers;
} extremes;

static inline void
look(const float *const *row, ptrdiff_t k, extremes *e)
{
    __m256 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = _mm256_loadu_ps(row[i] + k);
        e->least[i] = _mm256_min_ps(e->least[i], x[i]);
        e->most[i] = _mm256_max_ps(e->most[i], x[i]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 4; i += 2)
        e->numbers = _mm256_and_ps(e->numbers, _mm256_cmp_ps(x[i], x[i + 1], _CMP_ORD_Q));
}

static inline int
range_rows(const float *w, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t count,
           float limit, float *low, float *high)
{
    const ptrdiff_t whole = count / 8 * 8;
    __m256 bottom[LBQ_ROWS], top[LBQ_ROWS];
    __m256 within = _mm256_castsi256_ps(_mm256_set1_epi32(-1));
#pragma GCC unroll 2
    for (int q = 0; q < LBQ_ROWS; q += 4) {
        const float *row[4], *last[4];
        float rest[4][8];
        extremes e = {.numbers = within};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const ptrdiff_t r = first + q + i;
            row[i] = w + (r < rows ? r : rows - 1) * stride;
            last[i] = rest[i];
            e.least[i] = e.most[i] = _mm256_set1_ps(row[i][0]);
        }
        for (ptrdiff_t k = 0; k < whole; k += 8)
            look(row, k, &e);
        if (whole < count) {
            for (int i = 0; i < 4; i++) {
                _mm256_storeu_ps(rest[i], _mm256_set1_ps(row[i][0]));
                memcpy(rest[i], row[i] + whole, (size_t)(count - whole) * sizeof **rest);
            }
            look(last, 0, &e);
        }
        memcpy(bottom + q, e.least, sizeof e.least);
        memcpy(top + q, e.most, sizeof e.most);
        within = e.numbers;
    }
    const __m256 lowest = min_of_eight(bottom), highest = max_of_eight(top);
    _mm256_storeu_ps(low, lowest);
    _mm256_storeu_ps(high, highest);
    within = _mm256_and_ps(within, _mm256_cmp_ps(lowest, _mm256_set1_ps(-limit), _CMP_GE_OQ));
    within = _mm256_and_ps(within, _mm256_cmp_ps(highest, _mm256_set1_ps(limit), _CMP_LE_OQ));
    return _mm256_movemask_ps(within) == 0xff;
}

int
lbq_range_f32_avx2(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count, float limit,
                   float *low, float *high)
{
    int within = 1;
    for (int first = 0; first < LBQ_PANEL; first += LBQ_ROWS)
        within &= range_rows(w, stride, first, rows, count, limit, low + first, high + first);
    return within;
}

static inline __m256i
encode(const float *w, const float *grid, __m256 top)
{
    const __m256 inverse = _mm256_set1_ps(grid[0]), offset = _mm256_set1_ps(grid[LBQ_ROWS]);
    const __m256 x = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w), offset), inverse);
    return _mm256_cvtps_epi32(_mm256_min_ps(x, top)); /* packing turns negatives into 0 */
}

/* Eight columns of four rows, four columns in each half. */
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
    for (int r = 0; r < LBQ_ROWS; r += 4)
        for (int k = 0; k < 16; k += 8) {
            const __m256i four = encode_four(w + r * stride + k, stride, grid + r, top);
            uint8_t *const to = codes + k * LBQ_PANEL + 4 * r;
            _mm_storeu_si128((__m128i *)to, _mm256_castsi256_si128(four));
            _mm_storeu_si128((__m128i *)(to + 64), _mm256_extracti128_si256(four, 1));
        }
}

/* The same for fewer rows or columns. */
static __attribute__((noinline)) void
encode_rest(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, const float *grid,
            __m256 top, uint8_t *codes)
{
    float padded[LBQ_ROWS * 16];
    for (int i = 0; i < LBQ_ROWS * 16; i++)
        padded[i] = -HUGE_VALF;
    for (ptrdiff_t r = 0; r < rows && r < LBQ_ROWS; r++)
        memcpy(padded + r * 16, w + r * stride, (size_t)(columns < 16 ? columns : 16) * sizeof *w);
    encode_block(padded, 16, grid, top, codes);
}

static inline __attribute__((always_inline)) void
encode_rows(const float *w, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t count,
            const float *grid, int top, ptrdiff_t ahead, uint8_t *codes)
{
    const __m256 limit = _mm256_set1_ps((float)top), one = _mm256_set1_ps(1);
    const __m256 nearly_zero = _mm256_set1_ps(LBQ_NEARLY_ZERO);
    const ptrdiff_t whole = rows - first < LBQ_ROWS ? 0 : count / 16 * 16;
    const __m256 scale = _mm256_loadu_ps(grid + first);
    const __m256 none = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_EQ_OQ);
    float steps[2 * LBQ_ROWS]; /* 1 / scale, offset */
    _mm256_storeu_ps(steps, _mm256_blendv_ps(_mm256_div_ps(one, scale), nearly_zero, none));
    _mm256_storeu_ps(steps + LBQ_ROWS, _mm256_loadu_ps(grid + LBQ_PANEL + first));
    __asm__("" : "+m"(steps)); /* else gcc extracts them from the vectors one by one */
    w += first * stride;
    codes += 4 * first;
    ptrdiff_t k = 0;
    for (; k < whole; k += 16) {
        const float *at = w + k;
        __asm__("" : "+r"(at)); /* else gcc keeps one pointer per row, most of them in memory */
        for (int r = 0; r < LBQ_ROWS; r++)
            _mm_prefetch((const char *)(at + r * stride + ahead), _MM_HINT_T0);
        encode_block(at, stride, steps, limit, codes + k * LBQ_PANEL);
    }
    for (; k < count; k += 16)
        encode_rest(w + k, stride, rows - first, count - k, steps, limit, codes + k * LBQ_PANEL);
}

void
lbq_encode_f32_avx2(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count,
                    const float *grid, int top, ptrdiff_t ahead, uint8_t *codes)
{
    for (int first = 0; first < LBQ_PANEL; first += LBQ_ROWS)
        encode_rows(w, stride, first, rows, count, grid, top, ahead, codes);
}

static const lbq_by_rows by_rows = {range_rows, encode_rows, lbq_halve_rows_avx2};

void
lbq_cover_f16_avx2(const float *low, const float *high, const lbq_cover *cover, float *grid)
{
    lbq_cover_by_rows(by_rows, low, high, cover, grid);
}

int
lbq_round_panel_avx2(const float *w, ptrdiff_t stride, ptrdiff_t steps, ptrdiff_t count,
                     float limit, const lbq_cover *cover, int top, int bits, uint8_t *panel)
{
    return lbq_round_by_rows(by_rows, w, stride, steps, count, limit, cover, top, bits, panel);
}
