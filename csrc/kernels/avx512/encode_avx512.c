/* Ranges, grids and codes of a panel's rows: vectors along a row, joined four rows at a time. */
#include <immintrin.h>
#include <math.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/lanes_avx512.h"
#include "kernels/round.h"

/* Reduces vectors of four rows to one that holds an extreme of each in every 128 bits, and two of
 * these to the extremes of eight rows. */
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
    static inline __m256 name##_of_eight(const __m512 *four)                                       \
    {                                                                                              \
        const __m512 two = _mm512_##name##_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),        \
                                              _mm512_shuffle_f32x4(four[0], four[1], 0xdd));       \
        const __m512 one = _mm512_##name##_ps(two, _mm512_shuffle_f32x4(two, two, 0xb1));          \
        return _mm512_castps512_ps256(_mm512_shuffle_f32x4(one, one, 0x88));                       \
    }
DEFINE_JOIN(min)
DEFINE_JOIN(max)

/* Running minimum and maximum of four rows, and for each pair of rows the lanes without a NaN. */
typedef struct {
    __m512 least[4], most[4];
    __mmask16 numbers[2];
} extremes;

static inline __attribute__((always_inline)) void
look(const float *const *row, ptrdiff_t k, __mmask16 mask, extremes *e)
{
    __m512 x[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        x[i] = mask == 0xffff ? _mm512_loadu_ps(row[i] + k)
                              : _mm512_mask_loadu_ps(e->least[i], mask, row[i] + k);
        __asm__("" : "+v"(x[i])); /* else gcc loads it three times */
        e->least[i] = _mm512_min_ps(e->least[i], x[i]);
        e->most[i] = _mm512_max_ps(e->most[i], x[i]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++)
        e->numbers[i] = _mm512_mask_cmp_ps_mask(e->numbers[i], x[2 * i], x[2 * i + 1], _CMP_ORD_Q);
}

static inline __attribute__((always_inline)) int
range_rows(const float *w, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t count,
           float limit, float *low, float *high)
{
    const ptrdiff_t whole = count / 16 * 16;
    __m512 least[2], most[2];
    __mmask16 numbers = 0xffff;
    const float *next = w + (first < rows ? first : rows - 1) * stride;
#pragma GCC unroll 2
    for (int q = 0; q < 2; q++) {
        const float *row[4];
        extremes e = {.numbers = {0xffff, 0xffff}};
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            row[i] = next;
            next += first + 4 * q + i + 1 < rows ? stride : 0;
            e.least[i] = e.most[i] = _mm512_set1_ps(row[i][0]);
        }
        for (ptrdiff_t k = 0; k < whole; k += 16)
            look(row, k, 0xffff, &e);
        if (whole < count)
            look(row, whole, lbq_lanes_avx512(count - whole), &e);
        least[q] = min_of_four(e.least);
        most[q] = max_of_four(e.most);
        numbers &= e.numbers[0] & e.numbers[1];
    }
    const __m256 bottom = min_of_eight(least), top = max_of_eight(most);
    _mm256_storeu_ps(low, bottom);
    _mm256_storeu_ps(high, top);
    const __mmask8 above = _mm256_cmp_ps_mask(bottom, _mm256_set1_ps(-limit), _CMP_GE_OQ);
    const __mmask8 below = _mm256_cmp_ps_mask(top, _mm256_set1_ps(limit), _CMP_LE_OQ);
    return numbers == 0xffff && (above & below) == 0xff;
}

int
lbq_range_f32_avx512(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count, float limit,
                     float *low, float *high)
{
    int within = 1;
    for (int first = 0; first < LBQ_PANEL; first += LBQ_ROWS)
        within &= range_rows(w, stride, first, rows, count, limit, low + first, high + first);
    return within;
}

static inline __m512i
encode(const float *w, const float *grid, __m512 top)
{
    const __m512 inverse = _mm512_set1_ps(grid[0]), offset = _mm512_set1_ps(grid[LBQ_ROWS]);
    const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(w), offset), inverse);
    return _mm512_cvtps_epi32(_mm512_min_ps(x, top)); /* packing turns negatives into 0 */
}

/* Sixteen columns of four rows, four columns in each 128 bits. */
static inline __m512i
encode_four(const float *w, ptrdiff_t stride, const float *grid, __m512 top)
{
    const __m512i ab = _mm512_packus_epi32(encode(w, grid, top), encode(w + stride, grid + 1, top));
    const __m512i cd = _mm512_packus_epi32(encode(w + 2 * stride, grid + 2, top),
                                           encode(w + 3 * stride, grid + 3, top));
    return _mm512_packus_epi16(ab, cd);
}

/* Sixteen columns. */
static inline __attribute__((always_inline)) void
encode_block(const float *w, ptrdiff_t stride, const float *grid, __m512 top, uint8_t *codes)
{
    const __m512i a = encode_four(w, stride, grid, top);
    const __m512i b = encode_four(w + 4 * stride, stride, grid + 4, top);
    for (int i = 0; i < 4; i += 2) {
        const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
        const __m512i from = _mm512_add_epi64(first, _mm512_set1_epi64(2 * i));
        const __m512i eight = _mm512_permutex2var_epi64(a, from, b);
        uint8_t *const to = codes + 4 * i * LBQ_PANEL;
        _mm256_storeu_si256((__m256i *)to, _mm512_castsi512_si256(eight));
        _mm256_storeu_si256((__m256i *)(to + 64), _mm512_extracti64x4_epi64(eight, 1));
    }
}

/* The same for fewer rows or columns. */
static __attribute__((noinline)) void
encode_rest(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t columns, const float *grid,
            __m512 top, uint8_t *codes)
{
    const __m512 least = _mm512_set1_ps(-HUGE_VALF);
    float padded[LBQ_ROWS * 16];
    for (ptrdiff_t r = 0; r < LBQ_ROWS; r++) {
        const __mmask16 mask = r < rows ? lbq_lanes_avx512(columns) : 0;
        const float *const row = w + (r < rows ? r : 0) * stride;
        _mm512_storeu_ps(padded + r * 16, _mm512_mask_loadu_ps(least, mask, row));
    }
    encode_block(padded, 16, grid, top, codes);
}

static inline __attribute__((always_inline)) void
encode_rows(const float *w, ptrdiff_t stride, ptrdiff_t first, ptrdiff_t rows, ptrdiff_t count,
            const float *grid, int top, ptrdiff_t ahead, uint8_t *codes)
{
    const __m512 limit = _mm512_set1_ps((float)top);
    const ptrdiff_t whole = rows - first < LBQ_ROWS ? 0 : count / 16 * 16;
    const __m256 scale = _mm256_loadu_ps(grid + first);
    const __m256 one = _mm256_set1_ps(1), nearly_zero = _mm256_set1_ps(LBQ_NEARLY_ZERO);
    const __mmask8 some = _mm256_cmp_ps_mask(scale, _mm256_setzero_ps(), _CMP_NEQ_UQ);
    float steps[2 * LBQ_ROWS]; /* 1 / scale, offset */
    _mm256_storeu_ps(steps, _mm256_mask_div_ps(nearly_zero, some, one, scale));
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
lbq_encode_f32_avx512(const float *w, ptrdiff_t stride, ptrdiff_t rows, ptrdiff_t count,
                      const float *grid, int top, ptrdiff_t ahead, uint8_t *codes)
{
    for (int first = 0; first < LBQ_PANEL; first += LBQ_ROWS)
        encode_rows(w, stride, first, rows, count, grid, top, ahead, codes);
}

static inline void
halve(const float *x, int direction, uint8_t *half, float *value)
{
    const __m256 least = _mm256_set1_ps(-65504), most = _mm256_set1_ps(65504);
    const __m256 in = _mm256_min_ps(_mm256_max_ps(_mm256_loadu_ps(x), least), most);
    const __m128i bits = direction < 0 ? _mm256_cvtps_ph(in, _MM_FROUND_TO_NEG_INF)
                                       : _mm256_cvtps_ph(in, _MM_FROUND_TO_POS_INF);
    _mm_storeu_si128((__m128i *)half, bits);
    _mm256_storeu_ps(value, _mm256_cvtph_ps(bits));
}

static const lbq_by_rows by_rows = {range_rows, encode_rows, halve};

void
lbq_cover_f16_avx512(const float *low, const float *high, const lbq_cover *cover, float *grid)
{
    lbq_cover_by_rows(by_rows, low, high, cover, grid);
}

int
lbq_round_panel_avx512(const float *w, ptrdiff_t stride, ptrdiff_t steps, ptrdiff_t count,
                       float limit, const lbq_cover *cover, int top, int bits, uint8_t *panel)
{
    return lbq_round_by_rows(by_rows, w, stride, steps, count, limit, cover, top, bits, panel);
}
