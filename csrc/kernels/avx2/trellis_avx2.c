/* Rings of words: their levels, and their product with int8 activations.
 *
 * As trellis_avx2.c explains, with two registers for the 16 lanes. The sum of a level's two bytes,
 * each at most 127, is left to vpmaddubsw, whose 16 bits hold one level times one activation. */
#include <stdbool.h>

#include "core/ring.h"
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/panel_avx2.h"
#include "kernels/trellis.h"

enum { PANELS = 4, AHEAD = 1024 /* bytes, in each of four streams */ };

/* What is known when compiling: bits of a word, columns of a ring, bits of a window. */
typedef struct {
    int bits, cols, window;
} shape;

/* Sixteen lanes. */
typedef struct {
    __m256i half[2];
} lanes;

/* Numbers of four columns: 0 and 2, 1 and 3. */
typedef struct {
    lanes even, odd;
} columns;

typedef struct {
    __m256i mask, byte_mask, multiplier[LBQ_RING_COLS];
} constants;

LBQ_INLINE bool
is_wide(const shape of)
{
    return of.bits > 2 && of.cols == 1;
}

LBQ_INLINE constants
constants_of(const shape of, const lbq_trellis *trellis)
{
    return (constants){
        .mask = _mm256_set1_epi16((short)((1 << of.window) - 1)),
        .byte_mask = _mm256_set1_epi8(is_wide(of) ? 0x3F : 0x7F),
        .multiplier[0] = _mm256_set1_epi16((short)trellis->multiplier[0]),
        .multiplier[1] = _mm256_set1_epi16((short)trellis->multiplier[1]),
    };
}

/* In lane i what lane i + count has, around the ring; count is 1 or 2. */
LBQ_INLINE lanes
from_lane(lanes v, const int count)
{
    const __m256i order = _mm256_add_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                           _mm256_set1_epi32(count)); /* modulo 8 */
    lanes result;
    for (int h = 0; h < 2; h++) {
        const __m256i here = v.half[h], there = v.half[1 - h];
        const __m256i both =
            count == 1 ? _mm256_blend_epi32(here, there, 1) : _mm256_blend_epi32(here, there, 3);
        result.half[h] = _mm256_permutevar8x32_epi32(both, order);
    }
    return result;
}

/* Bits of `a` where the mask has them, else of `b`. */
LBQ_INLINE __m256i
chosen(__m256i mask, __m256i a, __m256i b)
{
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
}

LBQ_INLINE lanes
block_at(const uint8_t *codes, ptrdiff_t block)
{
    const uint8_t *const at = codes + LBQ_BLOCK * block;
    _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
    return (lanes){{
        _mm256_loadu_si256((const __m256i *)at),
        _mm256_loadu_si256((const __m256i *)(at + LBQ_BLOCK / 2)),
    }};
}

/* Half a byte of each byte, the upper one if `upper`, in the lower half; the rest is undefined. */
LBQ_INLINE __m256i
half_of(__m256i bytes, const int upper)
{
    return upper ? _mm256_srli_epi16(bytes, 4) : bytes;
}

/* Loads the numbers of four columns, the first of them 4 * four; `second` is four % 2. */
LBQ_INLINE columns
load_columns(const int bits, const uint8_t *codes, ptrdiff_t four, const int second)
{
    const __m256i low_byte = _mm256_set1_epi16(0xFF), low_half = _mm256_set1_epi8(0x0F);
    lanes low, high;
    if (bits == 1) {
        low = block_at(codes, four / 2);
        high = from_lane(low, 1);
        for (int h = 0; h < 2; h++) {
            const __m256i next = _mm256_slli_epi16(half_of(high.half[h], second), 4);
            low.half[h] = chosen(low_half, half_of(low.half[h], second), next);
        }
        high = from_lane(low, 2);
    } else if (bits == 2) {
        low = block_at(codes, four);
        high = from_lane(low, 1);
    } else if (bits == 3) {
        low = block_at(codes, four / 2 * 3 + second);
        high = block_at(codes, four / 2 * 3 + 2);
        for (int h = 0; h < 2; h++)
            high.half[h] = _mm256_and_si256(half_of(high.half[h], second), low_half);
    } else {
        low = block_at(codes, four * 2);
        high = block_at(codes, four * 2 + 1);
    }
    columns result;
    for (int h = 0; h < 2; h++) {
        const __m256i l = low.half[h], u = high.half[h];
        result.even.half[h] = chosen(low_byte, l, _mm256_slli_epi16(u, 8));
        result.odd.half[h] = chosen(low_byte, _mm256_srli_epi16(l, 8), u);
    }
    return result;
}

/* The windows of panel p, from the numbers of its lanes and of the lanes after them. */
LBQ_INLINE __m256i
windows_of(const shape of, const int p, __m256i number, __m256i next, __m256i mask)
{
    const int begin = of.bits * p, end = begin + of.window, known = of.bits == 3 ? 12 : 16;
    __m256i window = _mm256_srli_epi16(number, begin);
    if (end == known)
        return window;
    if (end > known)
        window = _mm256_or_si256(window, _mm256_slli_epi16(next, 4 * of.bits - begin));
    return _mm256_and_si256(window, mask);
}

/* The bytes whose sum is a level. */
LBQ_INLINE __m256i
bytes_of(const shape of, const int column, const constants *with, __m256i windows)
{
    const __m256i product = _mm256_mullo_epi16(windows, with->multiplier[column]);
    const __m256i bytes = _mm256_and_si256(product, with->byte_mask);
    if (!is_wide(of))
        return bytes;
    const __m256i high = _mm256_mulhi_epu16(product, with->multiplier[1]);
    return _mm256_add_epi8(bytes, _mm256_and_si256(high, with->byte_mask));
}

/* Activations of the columns of rings, each twice, as the bytes of levels lie. */
LBQ_INLINE void
load_activations(const shape of, const int8_t *q, const ptrdiff_t width, __m256i *even,
                 __m256i *odd)
{
    const __m256i four = broadcast_word(q);
    if (of.cols == 1) {
        even[0] = _mm256_shuffle_epi8(four, _mm256_set1_epi32(0x02020000));
        odd[0] = _mm256_shuffle_epi8(four, _mm256_set1_epi32(0x03030101));
        return;
    }
    const __m256i eight = _mm256_unpacklo_epi32(four, broadcast_word(q + 4 * width));
    for (int c = 0; c < 2; c++) {
        even[c] = _mm256_shuffle_epi8(eight, _mm256_set1_epi32(0x04040000 + 0x01010101 * c));
        odd[c] = _mm256_shuffle_epi8(eight, _mm256_set1_epi32(0x06060202 + 0x01010101 * c));
    }
}

/* sum += levels times activations. */
LBQ_INLINE void
add_levels(__m256i *sum, __m256i bytes, __m256i q)
{
    *sum = _mm256_add_epi32(*sum, widen(_mm256_maddubs_epi16(bytes, q), 1));
    LBQ_BARRIER(*sum);
}

/* Adds four columns of rings to the sums of each panel and token. */
LBQ_INLINE void
add_columns(const shape of, const int width, const constants *with, columns now, const int8_t *q,
            lanes sum[PANELS][4])
{
    __m256i even[4][LBQ_RING_COLS], odd[4][LBQ_RING_COLS];
#pragma GCC unroll 4
    for (int t = 0; t < width; t++)
        load_activations(of, q + 4 * t, width, even[t], odd[t]);
    const columns next = {from_lane(now.even, 1), from_lane(now.odd, 1)};
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++)
        for (int h = 0; h < 2; h++) {
            const __m256i a = windows_of(of, p, now.even.half[h], next.even.half[h], with->mask);
            const __m256i b = windows_of(of, p, now.odd.half[h], next.odd.half[h], with->mask);
            for (int c = 0; c < of.cols; c++) {
                const __m256i first = bytes_of(of, c, with, a), second = bytes_of(of, c, with, b);
                for (int t = 0; t < width; t++) {
                    add_levels(&sum[p][t].half[h], first, even[t][c]);
                    add_levels(&sum[p][t].half[h], second, odd[t][c]);
                }
            }
        }
}

/* The integer sums of a step. */
LBQ_INLINE void
sum_step(const shape of, const int width, const constants *with, const lbq_panel *panel,
         const uint8_t *codes, const int8_t *q, lanes sum[PANELS][4])
{
    const ptrdiff_t fours = panel->step / of.cols / (4 * PANELS);
    const int together = of.bits % 2 ? 2 : 1; /* how many fours share a block */
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < width; t++)
            sum[p][t].half[0] = sum[p][t].half[1] = _mm256_setzero_si256();
    for (int p = 0; p < PANELS; p++, codes += panel->panel_bytes)
        for (ptrdiff_t four = 0; four < fours; four += together)
#pragma GCC unroll 2
            for (int i = 0; i < together; i++) {
                const columns now = load_columns(of.bits, codes, four + i, i);
                add_columns(of, width, with, now, q, sum);
                q += 4 * of.cols * width;
            }
}

LBQ_INLINE void
gemv(const shape of, const int width, const lbq_panel *panel, const lbq_activations *x, float *y)
{
    const constants with = constants_of(of, panel->trellis);
    const uint8_t *codes = panel->codes, *scale = panel->scale;
    const int8_t *q = x->values;
    const float *factors = x->factors;
    for (ptrdiff_t i = 0; i < PANELS * width * LBQ_PANEL; i += HALF)
        _mm256_storeu_ps(y + i, _mm256_setzero_ps());
    for (ptrdiff_t left = panel->steps; left > 0; left--) {
        lanes sum[PANELS][4];
        sum_step(of, width, &with, panel, codes, q, sum);
        for (int p = 0; p < PANELS; p++)
            for (int h = 0; h < 2; h++) {
                const uint8_t *const at = scale + p * panel->panel_bytes;
                const __m256 s = load_scale(panel, at, h);
                for (int t = 0; t < width; t++) {
                    float *const to = y + (p * width + t) * LBQ_PANEL + h * HALF;
                    const __m256i dot = sum[p][t].half[h];
                    __m256 total = add_step(factors + t, width, s, dot, _mm256_loadu_ps(to));
                    if (panel->has_offset) {
                        const __m256 offset = load_half(at + 2 * LBQ_PANEL + 2 * HALF * h);
                        total = add_offset(factors + t, width, offset, total);
                    }
                    _mm256_storeu_ps(to, total);
                }
            }
        codes += panel->step_bytes;
        scale += panel->scale_stride;
        factors += 3 * width;
        q += panel->step * width;
    }
}

/* The levels of half the lanes of four columns of rings, to [k / 4][row][k % 4] of a panel. */
LBQ_INLINE void
store_levels(const shape of, const constants *with, __m256i a, __m256i b, uint8_t *bytes)
{
    const __m256i ones = _mm256_set1_epi8(1);
    __m256i even[LBQ_RING_COLS], odd[LBQ_RING_COLS];
    for (int c = 0; c < of.cols; c++) {
        even[c] = _mm256_maddubs_epi16(bytes_of(of, c, with, a), ones);
        odd[c] = _mm256_maddubs_epi16(bytes_of(of, c, with, b), ones);
    }
    __m256i *const to = (__m256i *)bytes;
    if (of.cols == 1) {
        _mm256_storeu_si256(to, _mm256_or_si256(even[0], _mm256_slli_epi16(odd[0], 8)));
        return;
    }
    const __m256i low = _mm256_set1_epi32(0xFFFF);
    const __m256i first = _mm256_or_si256(even[0], _mm256_slli_epi16(even[1], 8));
    const __m256i second = _mm256_or_si256(odd[0], _mm256_slli_epi16(odd[1], 8));
    _mm256_storeu_si256(to, chosen(low, first, _mm256_slli_epi32(second, 16)));
    _mm256_storeu_si256(to + 2, chosen(low, _mm256_srli_epi32(first, 16), second));
}

LBQ_INLINE void
expand(const shape of, const lbq_trellis *trellis, const uint8_t *codes, ptrdiff_t panel_bytes,
       ptrdiff_t count, ptrdiff_t pitch, uint8_t *bytes)
{
    const constants with = constants_of(of, trellis);
    const ptrdiff_t fours = count / of.cols / (4 * PANELS);
    const int together = of.bits % 2 ? 2 : 1;
    for (int p = 0; p < PANELS; p++, codes += panel_bytes)
        for (ptrdiff_t four = 0; four < fours; four += together)
#pragma GCC unroll 2
            for (int i = 0; i < together; i++, bytes += of.cols * LBQ_BLOCK) {
                const columns now = load_columns(of.bits, codes, four + i, i);
                const columns next = {from_lane(now.even, 1), from_lane(now.odd, 1)};
#pragma GCC unroll 4
                for (int to = 0; to < PANELS; to++)
                    for (int h = 0; h < 2; h++) {
                        const __m256i even = now.even.half[h], odd = now.odd.half[h];
                        store_levels(of,
                                     &with,
                                     windows_of(of, to, even, next.even.half[h], with.mask),
                                     windows_of(of, to, odd, next.odd.half[h], with.mask),
                                     bytes + to * pitch + h * (LBQ_BLOCK / 2));
                    }
            }
}

/* --- every shape has its own copy ------------------------------------------------------------- */

#define SHAPES(X)                                                                                  \
    X(1, 1, 10)                                                                                    \
    X(1, 1, 12)                                                                                    \
    X(2, 1, 10)                                                                                    \
    X(2, 1, 12)                                                                                    \
    X(3, 1, 12)                                                                                    \
    X(3, 1, 14)                                                                                    \
    X(4, 1, 12)                                                                                    \
    X(4, 1, 14)                                                                                    \
    X(3, 2, 12)

static bool
has_shape(const lbq_trellis *trellis, const shape of)
{
    return trellis->bits == of.bits && trellis->cols == of.cols && trellis->window == of.window;
}

void
lbq_gemv_trellis_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
#define TRY(...)                                                                                   \
    if (has_shape(panel->trellis, (shape){__VA_ARGS__})) {                                         \
        if (x->width == 1)                                                                         \
            gemv((shape){__VA_ARGS__}, 1, panel, x, y);                                            \
        else                                                                                       \
            gemv((shape){__VA_ARGS__}, 4, panel, x, y);                                            \
    }
    SHAPES(TRY)
#undef TRY
}

void
lbq_expand_trellis_avx2(const lbq_trellis *trellis, const uint8_t *codes, ptrdiff_t panel_bytes,
                        ptrdiff_t count, ptrdiff_t pitch, uint8_t *bytes)
{
#define TRY(...)                                                                                   \
    if (has_shape(trellis, (shape){__VA_ARGS__}))                                                  \
        expand((shape){__VA_ARGS__}, trellis, codes, panel_bytes, count, pitch, bytes);
    SHAPES(TRY)
#undef TRY
}
