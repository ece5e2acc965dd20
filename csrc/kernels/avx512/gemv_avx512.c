/* Packed panels times int8 activations of one token or four, straight from the codes.
 *
 * A 64-byte block is one register with a row per lane. Planes are masked in place, with at most one
 * shift per two planes: the sums of planes that lie 2 or 4 bits up are 4 or 16 times too large and
 * are shifted back once per step. Loads broadcast the activations for vpdpbusd. vpshufb turns codes
 * of a table of levels into bytes. */
#include <stdbool.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/panel_avx512.h"

enum { AHEAD = 4096 /* bytes: the hardware prefetcher stops at page ends */ };

#define MASK(bits) _mm512_set1_epi8((char)(bits))

/* Bits of a code, plus 16 if codes index the bytes of a table. */
typedef enum { U1 = 1, U2, U3, U4, U8 = 8, T2 = 16 + 2, T3, T4 } code_kind;

LBQ_INLINE int
bits_of(const code_kind kind)
{
    return kind % 16;
}

/* Integer sums of a step: of planes in place, and of planes some bits up. One token has two chains
 * of each, so that a vpdpbusd need not wait for the previous one. */
typedef struct {
    __m512i low[4], high[4];
} sums;

/* sum += plane * activations of columns k to k + 3, for each token. */
LBQ_INLINE void
accumulate(__m512i *sum, __m512i plane, const int8_t *q, ptrdiff_t k, const int width)
{
    const int chain = width == 1 ? k / 8 % 2 : 0;
#pragma GCC unroll 4
    for (int t = 0; t < width; t++)
        sum[chain + t] =
            _mm512_dpbusd_epi32(sum[chain + t], plane, broadcast_word(q + k * width + 4 * t));
}

LBQ_INLINE __m512i
block_at(const uint8_t *codes, ptrdiff_t block)
{
    _mm_prefetch((const char *)codes + 64 * block + AHEAD, _MM_HINT_T0);
    __m512i planes = _mm512_loadu_si512(codes + 64 * block);
    __asm__("" : "+v"(planes)); /* else gcc reloads it for every plane */
    return planes;
}

/* Rearranges the 16 rows of each k-byte into the four k-bytes of each row. */
LBQ_INLINE __m512i
transposed(__m512i bytes)
{
    const __m512i rows = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m128i row = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(rows, bytes), _mm512_broadcast_i32x4(row));
}

/* Several tokens share the planes. */
LBQ_INLINE void
sum_u1(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width, sums *sum)
{
    for (ptrdiff_t k = 0; k < columns; k += 32, codes += 64) {
        __m512i planes = transposed(block_at(codes, 0));
#pragma GCC unroll 4
        for (int p = 0; p < 8; p += 2) {
            accumulate(sum->low, _mm512_and_si512(planes, MASK(1)), q, k + 4 * p, width);
            accumulate(sum->high, _mm512_and_si512(planes, MASK(2)), q, k + 4 * p + 4, width);
            planes = _mm512_srli_epi16(planes, 2);
        }
    }
}

/* One token looks up sums of four activations, 16 rows at once, as gemv_u1_avx2.c explains. Up to
 * two blocks are summed in bytes, low and high parts separately. The sums take 8 bytes a column:
 * those of 4096 columns fill the first-level cache of a Zen 4, where weights from memory then
 * pass at 54 Gw/s instead of the 104 of 1024 columns. */
LBQ_INLINE void
look_up_u1(const uint8_t *codes, const ptrdiff_t columns, const uint8_t *subsets, sums *sum)
{
    __m512i low = _mm512_setzero_si512(), high = low;
    for (ptrdiff_t b = 0; b < columns / 32; b++, subsets += 256) {
        const __m512i planes = block_at(codes, b);
        const __m512i n0 = _mm512_and_si512(planes, MASK(15));
        const __m512i n1 = _mm512_and_si512(_mm512_srli_epi16(planes, 4), MASK(15));
        const __m512i *const of = (const __m512i *)subsets;
        low = _mm512_add_epi8(low, _mm512_shuffle_epi8(_mm512_loadu_si512(of), n0));
        low = _mm512_add_epi8(low, _mm512_shuffle_epi8(_mm512_loadu_si512(of + 1), n1));
        high = _mm512_add_epi8(high, _mm512_shuffle_epi8(_mm512_loadu_si512(of + 2), n0));
        high = _mm512_add_epi8(high, _mm512_shuffle_epi8(_mm512_loadu_si512(of + 3), n1));
    }
    /* The high part counts 16 times, and 32 was added to each of its 8 sums per block. */
    const __m512i excess = _mm512_set1_epi32((int)(columns / 32 * 16 * 8 * 32));
    sum->low[0] = _mm512_dpbusd_epi32(sum->low[0], transposed(low), MASK(1));
    sum->low[1] = _mm512_dpbusd_epi32(sum->low[1], transposed(high), MASK(16));
    sum->low[0] = _mm512_sub_epi32(sum->low[0], excess);
}

LBQ_INLINE void
sum_u2(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width, sums *sum)
{
#pragma GCC unroll 4
    for (ptrdiff_t k = 0; k < columns; k += 16, codes += 64) {
        const __m512i planes = block_at(codes, 0), upper = _mm512_srli_epi16(planes, 4);
        accumulate(sum->low, _mm512_and_si512(planes, MASK(3)), q, k, width);
        accumulate(sum->high, _mm512_and_si512(planes, MASK(12)), q, k + 4, width);
        accumulate(sum->low, _mm512_and_si512(upper, MASK(3)), q, k + 8, width);
        accumulate(sum->high, _mm512_and_si512(upper, MASK(12)), q, k + 12, width);
    }
}

/* Two low bits of `two` under `mask`, and the high bit that `one` holds above them. */
LBQ_INLINE __m512i
join(__m512i two, int mask, __m512i one, int bit)
{
    return _mm512_ternarylogic_epi64(_mm512_and_si512(two, MASK(mask)), one, MASK(bit), 0xf8);
}

LBQ_INLINE void
sum_u3(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width, sums *sum)
{
#pragma GCC unroll 2
    for (ptrdiff_t k = 0; k < columns; k += 32, codes += 192) {
        const __m512i a = block_at(codes, 0), b = block_at(codes, 1), h = block_at(codes, 2);
        const __m512i a4 = _mm512_srli_epi16(a, 4), b4 = _mm512_srli_epi16(b, 4);
        accumulate(sum->low, join(a, 3, _mm512_slli_epi16(h, 2), 4), q, k, width);
        accumulate(sum->high, join(a, 12, _mm512_slli_epi16(h, 3), 16), q, k + 4, width);
        accumulate(sum->low, join(a4, 3, h, 4), q, k + 8, width);
        accumulate(sum->high, join(a4, 12, _mm512_slli_epi16(h, 1), 16), q, k + 12, width);
        accumulate(sum->low, join(b, 3, _mm512_srli_epi16(h, 2), 4), q, k + 16, width);
        accumulate(sum->high, join(b, 12, _mm512_srli_epi16(h, 1), 16), q, k + 20, width);
        accumulate(sum->low, join(b4, 3, _mm512_srli_epi16(h, 4), 4), q, k + 24, width);
        accumulate(sum->high, join(b4, 12, _mm512_srli_epi16(h, 3), 16), q, k + 28, width);
    }
}

LBQ_INLINE void
sum_u4(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width, sums *sum)
{
#pragma GCC unroll 8
    for (ptrdiff_t k = 0; k < columns; k += 8, codes += 64) {
        const __m512i planes = block_at(codes, 0);
        accumulate(sum->low, _mm512_and_si512(planes, MASK(15)), q, k, width);
        accumulate(sum->high, _mm512_and_si512(planes, MASK(240)), q, k + 4, width);
    }
}

LBQ_INLINE void
sum_u8(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width, sums *sum)
{
#pragma GCC unroll 8
    for (ptrdiff_t k = 0; k < columns; k += 8, codes += 128) {
        accumulate(sum->low, block_at(codes, 0), q, k, width);
        accumulate(sum->high, block_at(codes, 1), q, k + 4, width);
    }
}

/* Bytes that a nibble selects: by its code, or by the first and second of its two 2-bit codes. */
typedef struct {
    __m512i first, second;
} lookup;

LBQ_INLINE lookup
lookup_of(const code_kind kind, const lbq_panel *panel)
{
    if (kind < T2)
        return (lookup){_mm512_setzero_si512(), _mm512_setzero_si512()};
    const __m128i table = _mm_loadu_si128((const __m128i *)panel->bytes);
    const __m128i upper_two = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (lookup){
        _mm512_broadcast_i32x4(table),
        _mm512_broadcast_i32x4(_mm_shuffle_epi8(table, upper_two)),
    };
}

LBQ_INLINE void
sum_t2(const lookup *table, const uint8_t *codes, const ptrdiff_t columns, const int8_t *q,
       const int width, sums *sum)
{
#pragma GCC unroll 4
    for (ptrdiff_t k = 0; k < columns; k += 16, codes += 64) {
        const __m512i planes = block_at(codes, 0);
        const __m512i lower = _mm512_and_si512(planes, MASK(15));
        const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(planes, 4), MASK(15));
        accumulate(sum->low, _mm512_shuffle_epi8(table->first, lower), q, k, width);
        accumulate(sum->high, _mm512_shuffle_epi8(table->second, lower), q, k + 4, width);
        accumulate(sum->low, _mm512_shuffle_epi8(table->first, upper), q, k + 8, width);
        accumulate(sum->high, _mm512_shuffle_epi8(table->second, upper), q, k + 12, width);
    }
}

LBQ_INLINE void
sum_t3(const lookup *table, const uint8_t *codes, const ptrdiff_t columns, const int8_t *q,
       const int width, sums *sum)
{
#pragma GCC unroll 2
    for (ptrdiff_t k = 0; k < columns; k += 32, codes += 192) {
        const __m512i ones = block_at(codes, 2);
        const __m512i twos[2] = {block_at(codes, 0), block_at(codes, 1)};
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
            const __m512i low = _mm512_srli_epi16(twos[p / 4], (unsigned)(p % 4 * 2));
            const __m512i high = p < 2 ? _mm512_slli_epi16(ones, (unsigned)(2 - p))
                                       : _mm512_srli_epi16(ones, (unsigned)(p - 2));
            const __m512i plane = _mm512_shuffle_epi8(table->first, join(low, 3, high, 4));
            accumulate(p % 2 ? sum->high : sum->low, plane, q, k + 4 * p, width);
        }
    }
}

LBQ_INLINE void
sum_t4(const lookup *table, const uint8_t *codes, const ptrdiff_t columns, const int8_t *q,
       const int width, sums *sum)
{
#pragma GCC unroll 8
    for (ptrdiff_t k = 0; k < columns; k += 8, codes += 64) {
        const __m512i planes = block_at(codes, 0);
        const __m512i lower = _mm512_and_si512(planes, MASK(15));
        const __m512i upper = _mm512_and_si512(_mm512_srli_epi16(planes, 4), MASK(15));
        accumulate(sum->low, _mm512_shuffle_epi8(table->first, lower), q, k, width);
        accumulate(sum->high, _mm512_shuffle_epi8(table->first, upper), q, k + 4, width);
    }
}

LBQ_INLINE void
sum_columns(const code_kind kind, const lookup *table, const uint8_t *codes,
            const ptrdiff_t columns, const lbq_activations *x, const int8_t *q, const int width,
            sums *sum)
{
    switch (kind) {
    case U1:
        if (width == 1)
            look_up_u1(codes, columns, x->sums + 8 * (q - x->values), sum);
        else
            sum_u1(codes, columns, q, width, sum);
        break;
    case U2:
        sum_u2(codes, columns, q, width, sum);
        break;
    case U3:
        sum_u3(codes, columns, q, width, sum);
        break;
    case U4:
        sum_u4(codes, columns, q, width, sum);
        break;
    case U8:
        sum_u8(codes, columns, q, width, sum);
        break;
    case T2:
        sum_t2(table, codes, columns, q, width, sum);
        break;
    case T3:
        sum_t3(table, codes, columns, q, width, sum);
        break;
    case T4:
        sum_t4(table, codes, columns, q, width, sum);
    }
}

/* Partial sums y of some tokens, and the factors of the next step: the panel's scales, followed by
 * its offsets, and the tokens' factors. */
typedef struct {
    __m512 y[4];
    const uint8_t *scale;
    const float *factors;
} progress;

/* Adds the integer sums of a step to y. */
LBQ_INLINE void
add_sums(progress *to, const lbq_panel *panel, const int width, const __m512i *dot)
{
    const __m512 scale = load_scale(panel, to->scale);
    for (int t = 0; t < width; t++)
        to->y[t] = add_step(to->factors + t, width, scale, dot[t], to->y[t]);
    if (LBQ_LIKELY(panel->has_offset)) {
        const __m512 offset = load_half(to->scale + 2 * LBQ_PANEL);
        for (int t = 0; t < width; t++)
            to->y[t] = add_offset(to->factors + t, width, offset, to->y[t]);
    }
    to->scale += panel->scale_stride;
    to->factors += 3 * width;
}

/* The integer sums of a step. */
LBQ_INLINE void
sum_step(const code_kind kind, const ptrdiff_t step, const lookup *table, const uint8_t *codes,
         const lbq_activations *x, const int8_t *q, const int width, __m512i *dot)
{
    /* How many bits up the planes of `high` lie. */
    const int up = kind == U1 ? 1 : kind == U4 ? 4 : kind == U2 || kind == U3 ? 2 : 0;
    /* Byte sums of 1-bit codes are full after 64 columns; the others use pieces of that size. */
    const ptrdiff_t most = step < 64 ? step : 64, turn = width == 1 ? step : most;
    ptrdiff_t end = step;
    if (turn < step)
        __asm__("" : "+r"(end)); /* else gcc unrolls this loop as well, for no gain */
    sums sum;
    for (int t = 0; t < 4; t++)
        sum.low[t] = sum.high[t] = _mm512_setzero_si512();
#pragma GCC unroll 1
    for (ptrdiff_t first = 0; first < end; first += turn)
#pragma GCC unroll 2
        for (ptrdiff_t k = first; k < first + turn; k += most) {
            const uint8_t *const at = codes + k * bits_of(kind) * LBQ_PANEL / 8;
            sum_columns(kind, table, at, most, x, q + k * width, width, &sum);
        }
    if (width == 1) {
        sum.low[0] = _mm512_add_epi32(sum.low[0], sum.low[1]);
        sum.high[0] = _mm512_add_epi32(sum.high[0], sum.high[1]);
    }
    for (int t = 0; t < width; t++)
        dot[t] = _mm512_add_epi32(sum.low[t], _mm512_srai_epi32(sum.high[t], up));
}

/* A panel whose steps have `step` columns. A step's sums are added to y after the next step's are
 * computed: gemv_avx2.c says why. */
LBQ_INLINE void
gemv(const code_kind kind, const ptrdiff_t step, const int width, const lbq_panel *panel,
     const lbq_activations *x, float *y)
{
    const lookup table = lookup_of(kind, panel);
    const uint8_t *codes = panel->codes;
    const int8_t *q = x->values;
    progress sum = {.scale = panel->scale, .factors = x->factors};
    for (int t = 0; t < width; t++)
        sum.y[t] = _mm512_setzero_ps();
    __m512i last[4], dot[4];
    bool started = false;
    for (ptrdiff_t left = panel->steps; left > 0; left--) {
        sum_step(kind, step, &table, codes, x, q, width, dot);
        if (LBQ_LIKELY(started))
            add_sums(&sum, panel, width, last);
        started = true;
        for (int t = 0; t < width; t++)
            last[t] = dot[t];
        codes += panel->step_bytes;
        q += step * width;
    }
    if (started)
        add_sums(&sum, panel, width, last);
    for (int t = 0; t < width; t++)
        _mm512_storeu_ps(y + t * LBQ_PANEL, sum.y[t]);
}

/* Every step length has its own copy, with its loop over the columns unrolled. */
LBQ_INLINE void
gemv_steps(const code_kind kind, const int width, const lbq_panel *panel, const lbq_activations *x,
           float *y)
{
    if (panel->step == 128)
        gemv(kind, 128, width, panel, x, y);
    else if (panel->step == 64)
        gemv(kind, 64, width, panel, x, y);
    else if (panel->step == 32)
        gemv(kind, 32, width, panel, x, y);
    else if (kind != U1 && kind != U3 && kind != T3)
        gemv(kind, 16, width, panel, x, y);
}

LBQ_INLINE void
gemv_any(const code_kind kind, const lbq_panel *panel, const lbq_activations *x, float *y)
{
    if (x->width == 1)
        gemv_steps(kind, 1, panel, x, y);
    else
        gemv_steps(kind, 4, panel, x, y);
}

void
lbq_gemv_u1_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U1, panel, x, y);
}

void
lbq_gemv_u2_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U2, panel, x, y);
}

void
lbq_gemv_u3_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U3, panel, x, y);
}

void
lbq_gemv_u4_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U4, panel, x, y);
}

void
lbq_gemv_u8_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U8, panel, x, y);
}

void
lbq_gemv_t2_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(T2, panel, x, y);
}

void
lbq_gemv_t3_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(T3, panel, x, y);
}

void
lbq_gemv_t4_i8_avx512(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(T4, panel, x, y);
}
