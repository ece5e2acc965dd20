/* Rings of words: their levels, and their product with int8 activations.
 *
 * Four columns of a ring, 16 lanes each, are two registers of 16-bit numbers, the bits from the
 * first word of a lane on: columns 0 and 2 in one, 1 and 3 in the other. All windows of a panel
 * then begin at the same bit, so that immediate shifts find them, at most two and one merge. The
 * sum of a level's two bytes is left to vpdpbusd, which multiplies both by the same activation. */
#include <stdbool.h>

#include "core/ring.h"
#include "kernels/avx512/avx512.h"
#include "kernels/avx512/panel_avx512.h"
#include "kernels/trellis.h"

enum { PANELS = 4, AHEAD = 1024 /* bytes, in each of four streams */ };

/* What is known when compiling: bits of a word, columns of a ring, bits of a window. */
typedef struct {
    int bits, cols, window;
} shape;

/* Numbers of four columns: 0 and 2, 1 and 3. */
typedef struct {
    __m512i even, odd;
} columns;

typedef struct {
    __m512i mask, byte_mask, multiplier[LBQ_RING_COLS];
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
        .mask = _mm512_set1_epi16((short)((1 << of.window) - 1)),
        .byte_mask = _mm512_set1_epi8(is_wide(of) ? 0x3F : 0x7F),
        .multiplier[0] = _mm512_set1_epi16((short)trellis->multiplier[0]),
        .multiplier[1] = _mm512_set1_epi16((short)trellis->multiplier[1]),
    };
}

/* In lane i what lane i + count has, around the ring. */
#define FROM_LANE(v, count) _mm512_alignr_epi32(v, v, count)

/* Bits of `a` where the mask has them, else of `b`. */
LBQ_INLINE __m512i
chosen(__m512i mask, __m512i a, __m512i b)
{
    return _mm512_ternarylogic_epi64(mask, a, b, 0xCA);
}

LBQ_INLINE __m512i
block_at(const uint8_t *codes, ptrdiff_t block)
{
    _mm_prefetch((const char *)codes + LBQ_BLOCK * block + AHEAD, _MM_HINT_T0);
    return _mm512_loadu_si512(codes + LBQ_BLOCK * block);
}

/* Half a byte of each byte, the upper one if `upper`, in the lower half; the rest is undefined. */
LBQ_INLINE __m512i
half_of(__m512i bytes, const int upper)
{
    return upper ? _mm512_srli_epi16(bytes, 4) : bytes;
}

/* Loads the numbers of four columns, the first of them 4 * four; `second` is four % 2. */
LBQ_INLINE columns
load_columns(const int bits, const uint8_t *codes, ptrdiff_t four, const int second)
{
    const __m512i low_byte = _mm512_set1_epi16(0xFF), low_half = _mm512_set1_epi8(0x0F);
    __m512i low, high;
    if (bits == 1) {
        const __m512i half = half_of(block_at(codes, four / 2), second);
        low = chosen(low_half, half, _mm512_slli_epi16(FROM_LANE(half, 1), 4));
        high = FROM_LANE(low, 2);
    } else if (bits == 2) {
        low = block_at(codes, four);
        high = FROM_LANE(low, 1);
    } else if (bits == 3) {
        low = block_at(codes, four / 2 * 3 + second);
        const __m512i halves = _mm512_loadu_si512(codes + LBQ_BLOCK * (four / 2 * 3 + 2));
        high = _mm512_and_si512(half_of(halves, second), low_half);
    } else {
        low = block_at(codes, four * 2);
        high = block_at(codes, four * 2 + 1);
    }
    return (columns){
        chosen(low_byte, low, _mm512_slli_epi16(high, 8)),
        chosen(low_byte, _mm512_srli_epi16(low, 8), high),
    };
}

/* The windows of panel p, from the numbers of its lanes and of the lanes after them. */
LBQ_INLINE __m512i
windows_of(const shape of, const int p, __m512i number, __m512i next, __m512i mask)
{
    const int begin = of.bits * p, end = begin + of.window, known = of.bits == 3 ? 12 : 16;
    const __m512i here = _mm512_srli_epi16(number, (unsigned)begin);
    if (end == known)
        return here;
    if (end < known)
        return _mm512_and_si512(here, mask);
    const __m512i there = _mm512_slli_epi16(next, (unsigned)(4 * of.bits - begin));
    return _mm512_ternarylogic_epi64(here, there, mask, 0xA8);
}

/* The bytes whose sum is a level. */
LBQ_INLINE __m512i
bytes_of(const shape of, const int column, const constants *with, __m512i windows)
{
    const __m512i product = _mm512_mullo_epi16(windows, with->multiplier[column]);
    const __m512i bytes = _mm512_and_si512(product, with->byte_mask);
    if (!is_wide(of))
        return bytes;
    const __m512i high = _mm512_mulhi_epu16(product, with->multiplier[1]);
    return _mm512_add_epi8(bytes, _mm512_and_si512(high, with->byte_mask));
}

/* Activations of the columns of rings, each twice, as the bytes of levels lie. */
LBQ_INLINE void
load_activations(const shape of, const int8_t *q, const ptrdiff_t width, __m512i *even,
                 __m512i *odd)
{
    const __m512i four = broadcast_word(q);
    if (of.cols == 1) {
        even[0] = _mm512_shuffle_epi8(
            four, _mm512_set4_epi32(0x0E0E0C0C, 0x0A0A0808, 0x06060404, 0x02020000));
        odd[0] = _mm512_shuffle_epi8(
            four, _mm512_set4_epi32(0x0F0F0D0D, 0x0B0B0909, 0x07070505, 0x03030101));
        return;
    }
    const __m512i eight = _mm512_unpacklo_epi32(four, broadcast_word(q + 4 * width));
    for (int c = 0; c < 2; c++) {
        even[c] = _mm512_shuffle_epi8(eight, _mm512_set1_epi32(0x04040000 + 0x01010101 * c));
        odd[c] = _mm512_shuffle_epi8(eight, _mm512_set1_epi32(0x06060202 + 0x01010101 * c));
    }
}

/* Adds four columns of rings to the sums of each panel and token. */
LBQ_INLINE void
add_columns(const shape of, const int width, const constants *with, columns now, const int8_t *q,
            __m512i sum[PANELS][4])
{
    __m512i even[4][LBQ_RING_COLS], odd[4][LBQ_RING_COLS];
#pragma GCC unroll 4
    for (int t = 0; t < width; t++)
        load_activations(of, q + 4 * t, width, even[t], odd[t]);
    const columns next = {FROM_LANE(now.even, 1), FROM_LANE(now.odd, 1)};
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++) {
        const __m512i a = windows_of(of, p, now.even, next.even, with->mask);
        const __m512i b = windows_of(of, p, now.odd, next.odd, with->mask);
#pragma GCC unroll 2
        for (int c = 0; c < of.cols; c++) {
            const __m512i first = bytes_of(of, c, with, a), second = bytes_of(of, c, with, b);
#pragma GCC unroll 4
            for (int t = 0; t < width; t++) {
                sum[p][t] = _mm512_dpbusd_epi32(sum[p][t], first, even[t][c]);
                sum[p][t] = _mm512_dpbusd_epi32(sum[p][t], second, odd[t][c]);
            }
        }
    }
}

/* The integer sums of a step. */
LBQ_INLINE void
sum_step(const shape of, const int width, const constants *with, const lbq_panel *panel,
         const uint8_t *codes, const int8_t *q, __m512i sum[PANELS][4])
{
    const ptrdiff_t fours = panel->step / of.cols / (4 * PANELS);
    const int together = of.bits % 2 ? 2 : 1; /* how many fours share a block */
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < width; t++)
            sum[p][t] = _mm512_setzero_si512();
    for (int p = 0; p < PANELS; p++, codes += panel->panel_bytes)
#pragma GCC unroll 1
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
    __m512 total[PANELS][4];
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < width; t++)
            total[p][t] = _mm512_setzero_ps();
    for (ptrdiff_t left = panel->steps; left > 0; left--) {
        __m512i sum[PANELS][4];
        sum_step(of, width, &with, panel, codes, q, sum);
        for (int p = 0; p < PANELS; p++) {
            const uint8_t *const at = scale + p * panel->panel_bytes;
            const __m512 s = load_scale(panel, at);
            for (int t = 0; t < width; t++) {
                total[p][t] = add_step(factors + t, width, s, sum[p][t], total[p][t]);
                if (panel->has_offset)
                    total[p][t] =
                        add_offset(factors + t, width, load_half(at + 2 * LBQ_PANEL), total[p][t]);
            }
        }
        codes += panel->step_bytes;
        scale += panel->scale_stride;
        factors += 3 * width;
        q += panel->step * width;
    }
    for (int p = 0; p < PANELS; p++)
        for (int t = 0; t < width; t++)
            _mm512_storeu_ps(y + (p * width + t) * LBQ_PANEL, total[p][t]);
}

/* The levels of four columns of rings, to [k / 4][row][k % 4] of each panel. */
LBQ_INLINE void
store_levels(const shape of, const constants *with, columns now, ptrdiff_t pitch, uint8_t *bytes)
{
    const __m512i ones = _mm512_set1_epi8(1);
    const columns next = {FROM_LANE(now.even, 1), FROM_LANE(now.odd, 1)};
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; p++, bytes += pitch) {
        const __m512i a = windows_of(of, p, now.even, next.even, with->mask);
        const __m512i b = windows_of(of, p, now.odd, next.odd, with->mask);
        __m512i even[LBQ_RING_COLS], odd[LBQ_RING_COLS];
        for (int c = 0; c < of.cols; c++) {
            even[c] = _mm512_maddubs_epi16(bytes_of(of, c, with, a), ones);
            odd[c] = _mm512_maddubs_epi16(bytes_of(of, c, with, b), ones);
        }
        if (of.cols == 1) {
            _mm512_storeu_si512(bytes, _mm512_or_si512(even[0], _mm512_slli_epi16(odd[0], 8)));
            continue;
        }
        const __m512i low = _mm512_set1_epi32(0xFFFF);
        const __m512i first = _mm512_or_si512(even[0], _mm512_slli_epi16(even[1], 8));
        const __m512i second = _mm512_or_si512(odd[0], _mm512_slli_epi16(odd[1], 8));
        _mm512_storeu_si512(bytes, chosen(low, first, _mm512_slli_epi32(second, 16)));
        _mm512_storeu_si512(bytes + LBQ_BLOCK, chosen(low, _mm512_srli_epi32(first, 16), second));
    }
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
                store_levels(of, &with, now, pitch, bytes);
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
lbq_gemv_trellis_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
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
lbq_expand_trellis_avx512(const lbq_trellis *trellis, const uint8_t *codes, ptrdiff_t panel_bytes,
                          ptrdiff_t count, ptrdiff_t pitch, uint8_t *bytes)
{
#define TRY(...)                                                                                   \
    if (has_shape(trellis, (shape){__VA_ARGS__}))                                                  \
        expand((shape){__VA_ARGS__}, trellis, codes, panel_bytes, count, pitch, bytes);
    SHAPES(TRY)
#undef TRY
}
