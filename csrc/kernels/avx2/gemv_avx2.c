/* Packed panels times int8 activations of one token or four, straight from the codes.
 *
 * maddubs sums pairs of products in 16 bits, where up to 64 columns fit without overflow: eight of
 * the largest pairs 15 * 127 * 2, or sixteen of 7 * 127 * 2. Planes that lie some bits up are
 * multiplied in place and their sums shifted back. 8-bit codes are treated as two 4-bit ones, as
 * are the bytes of a table, which vpshufb looks up. */
#include <stdbool.h>

#include "kernels/avx2/avx2.h"
#include "kernels/avx2/gemv_avx2.h"

/* Bits of a code, plus 16 if codes index the bytes of a table. 1-bit codes have their own file. */
typedef enum { U2 = 2, U3, U4, U8 = 8, T2 = 16 + 2, T3, T4 } code_kind;

LBQ_INLINE int
bits_of(const code_kind kind)
{
    return kind % 16;
}

enum { AHEAD = 4096 /* bytes: the hardware prefetcher stops at page ends */ };

/* A block's upper eight rows and its lower eight. One token processes both at once, four tokens one
 * after the other, so that the sums fit in registers. */
typedef struct {
    __m256i half[2];
} block;

LBQ_INLINE block
load_block(const uint8_t *codes, const int halves)
{
    _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
    block b;
    for (int h = 0; h < halves; h++) {
        b.half[h] = _mm256_loadu_si256((const __m256i *)(codes + 32 * h));
        __asm__("" : "+x"(b.half[h])); /* else gcc reloads it for every plane */
    }
    return b;
}

LBQ_INLINE block
masked(block b, int mask, const int halves)
{
    for (int h = 0; h < halves; h++)
        b.half[h] = _mm256_and_si256(b.half[h], _mm256_set1_epi8((char)mask));
    return b;
}

LBQ_INLINE block
shifted(block b, int right, const int halves)
{
    for (int h = 0; h < halves; h++)
        b.half[h] =
            right < 0 ? _mm256_slli_epi16(b.half[h], -right) : _mm256_srli_epi16(b.half[h], right);
    return b;
}

LBQ_INLINE block
joined(block a, block b, const int halves)
{
    for (int h = 0; h < halves; h++)
        a.half[h] = _mm256_or_si256(a.half[h], b.half[h]);
    return a;
}

/* 16-bit sums, [half][token]: of planes in place, and of the others. */
typedef struct {
    __m256i low[4], high[4];
} sums;

/* sum += plane * activations of columns k to k + 3. */
LBQ_INLINE void
accumulate(__m256i *sum, block plane, const int8_t *q, ptrdiff_t k, const int width,
           const int halves)
{
#pragma GCC unroll 4
    for (int t = 0; t < width; t++) {
        const __m256i word = broadcast_word(q + k * width + 4 * t);
        for (int h = 0; h < halves; h++)
            add_products(&sum[h * width + t], plane.half[h], word);
    }
}

LBQ_INLINE void
sum_u2(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width,
       const int halves, sums *sum)
{
#pragma GCC unroll 4
    for (ptrdiff_t k = 0; k < columns; k += 16, codes += 64) {
        const block planes = load_block(codes, halves), upper = shifted(planes, 4, halves);
        accumulate(sum->low, masked(planes, 3, halves), q, k, width, halves);
        accumulate(sum->high, masked(planes, 12, halves), q, k + 4, width, halves);
        accumulate(sum->low, masked(upper, 3, halves), q, k + 8, width, halves);
        accumulate(sum->high, masked(upper, 12, halves), q, k + 12, width, halves);
    }
}

LBQ_INLINE void
sum_u3(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width,
       const int halves, sums *sum)
{
#pragma GCC unroll 2
    for (ptrdiff_t k = 0; k < columns; k += 32, codes += 192) {
        const block ones = load_block(codes + 128, halves);
        block twos[2] = {load_block(codes, halves), load_block(codes + 64, halves)};
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
            const block low = masked(twos[p / 4], 3, halves);
            const block high = masked(shifted(ones, p - 2, halves), 4, halves);
            accumulate(sum->low, joined(low, high, halves), q, k + 4 * p, width, halves);
            twos[p / 4] = shifted(twos[p / 4], 2, halves);
        }
    }
}

LBQ_INLINE void
sum_u4(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width,
       const int halves, sums *sum)
{
#pragma GCC unroll 8
    for (ptrdiff_t k = 0; k < columns; k += 8, codes += 64) {
        const block planes = load_block(codes, halves), upper = shifted(planes, 4, halves);
        accumulate(sum->low, masked(planes, 15, halves), q, k, width, halves);
        accumulate(sum->high, masked(upper, 15, halves), q, k + 4, width, halves);
    }
}

LBQ_INLINE void
sum_u8(const uint8_t *codes, const ptrdiff_t columns, const int8_t *q, const int width,
       const int halves, sums *sum)
{
#pragma GCC unroll 8
    for (ptrdiff_t k = 0; k < columns; k += 4, codes += 64) {
        const block planes = load_block(codes, halves), upper = shifted(planes, 4, halves);
        accumulate(sum->low, masked(planes, 15, halves), q, k, width, halves);
        accumulate(sum->high, masked(upper, 15, halves), q, k, width, halves);
    }
}

/* Low and high halves of the bytes that a nibble selects. */
typedef struct {
    __m256i low, high;
} lookup;

/* For the code in a nibble, or for the first and second of its two 2-bit codes. */
typedef struct {
    lookup first, second;
} lookups;

LBQ_INLINE lookup
lookup_of(__m128i bytes)
{
    const __m256i table = _mm256_broadcastsi128_si256(bytes), low = _mm256_set1_epi8(15);
    return (lookup){
        _mm256_and_si256(table, low),
        _mm256_and_si256(_mm256_srli_epi16(table, 4), low),
    };
}

LBQ_INLINE lookups
lookups_of(const code_kind kind, const lbq_panel *panel)
{
    const __m128i bytes =
        kind < T2 ? _mm_setzero_si128() : _mm_loadu_si128((const __m128i *)panel->bytes);
    const __m128i upper_two = _mm_setr_epi8(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return (lookups){lookup_of(bytes), lookup_of(_mm_shuffle_epi8(bytes, upper_two))};
}

LBQ_INLINE void
accumulate_lookup(sums *sum, const lookup *table, block codes, const int8_t *q, ptrdiff_t k,
                  const int width, const int halves)
{
    block low, high;
    for (int h = 0; h < halves; h++) {
        low.half[h] = _mm256_shuffle_epi8(table->low, codes.half[h]);
        high.half[h] = _mm256_shuffle_epi8(table->high, codes.half[h]);
    }
    accumulate(sum->low, low, q, k, width, halves);
    accumulate(sum->high, high, q, k, width, halves);
}

LBQ_INLINE void
sum_t2(const lookups *table, const uint8_t *codes, const ptrdiff_t columns, const int8_t *q,
       const int width, const int halves, sums *sum)
{
#pragma GCC unroll 2
    for (ptrdiff_t k = 0; k < columns; k += 16, codes += 64) {
        const block planes = load_block(codes, halves), lower = masked(planes, 15, halves);
        accumulate_lookup(sum, &table->first, lower, q, k, width, halves);
        accumulate_lookup(sum, &table->second, lower, q, k + 4, width, halves);
        const block upper = masked(shifted(planes, 4, halves), 15, halves);
        accumulate_lookup(sum, &table->first, upper, q, k + 8, width, halves);
        accumulate_lookup(sum, &table->second, upper, q, k + 12, width, halves);
    }
}

LBQ_INLINE void
sum_t3(const lookups *table, const uint8_t *codes, const ptrdiff_t columns, const int8_t *q,
       const int width, const int halves, sums *sum)
{
    for (ptrdiff_t k = 0; k < columns; k += 32, codes += 192) {
        const block ones = load_block(codes + 128, halves);
        block twos[2] = {load_block(codes, halves), load_block(codes + 64, halves)};
#pragma GCC unroll 8
        for (int p = 0; p < 8; p++) {
            const block low = masked(twos[p / 4], 3, halves);
            const block high = masked(shifted(ones, p - 2, halves), 4, halves);
            const block joint = joined(low, high, halves);
            accumulate_lookup(sum, &table->first, joint, q, k + 4 * p, width, halves);
            twos[p / 4] = shifted(twos[p / 4], 2, halves);
        }
    }
}

LBQ_INLINE void
sum_t4(const lookups *table, const uint8_t *codes, const ptrdiff_t columns, const int8_t *q,
       const int width, const int halves, sums *sum)
{
#pragma GCC unroll 4
    for (ptrdiff_t k = 0; k < columns; k += 8, codes += 64) {
        const block planes = load_block(codes, halves);
        const block upper = masked(shifted(planes, 4, halves), 15, halves);
        accumulate_lookup(sum, &table->first, masked(planes, 15, halves), q, k, width, halves);
        accumulate_lookup(sum, &table->first, upper, q, k + 4, width, halves);
    }
}

/* dot += the 32-bit sums of `columns` columns, as [half][token]. */
LBQ_INLINE void
sum_columns(const code_kind kind, const lookups *table, const uint8_t *codes,
            const ptrdiff_t columns, const int8_t *q, const int width, const int halves,
            __m256i *dot)
{
    sums sum;
    for (int i = 0; i < width * halves; i++)
        sum.low[i] = sum.high[i] = _mm256_setzero_si256();
    switch (kind) {
    case U2:
        sum_u2(codes, columns, q, width, halves, &sum);
        break;
    case U3:
        sum_u3(codes, columns, q, width, halves, &sum);
        break;
    case U4:
        sum_u4(codes, columns, q, width, halves, &sum);
        break;
    case U8:
        sum_u8(codes, columns, q, width, halves, &sum);
        break;
    case T2:
        sum_t2(table, codes, columns, q, width, halves, &sum);
        break;
    case T3:
        sum_t3(table, codes, columns, q, width, halves, &sum);
        break;
    case T4:
        sum_t4(table, codes, columns, q, width, halves, &sum);
    }
    for (int i = 0; i < width * halves; i++) {
        __m256i part;
        if (kind == U2)
            part = widen(
                _mm256_add_epi16(sum.low[i], _mm256_srai_epi16(sum.high[i], bits_of(kind))), 1);
        else if (kind == U3)
            part = widen(sum.low[i], 1);
        else
            part = _mm256_add_epi32(widen(sum.low[i], 1), widen(sum.high[i], kind == U4 ? 1 : 16));
        dot[i] = _mm256_add_epi32(dot[i], part);
    }
}

/* The integer sums of a step, as [half][token]. */
LBQ_INLINE void
sum_step(const code_kind kind, const ptrdiff_t step, const lookups *table, const uint8_t *codes,
         const int8_t *q, const int width, const int halves, __m256i *dot)
{
    /* 16-bit sums are full after 32 columns of 8-bit codes, and after 64 of the others. */
    const ptrdiff_t most = kind >= U8 ? 32 : 64, exact = step < most ? step : most;
    const ptrdiff_t turn = width == 1 && kind != U8 ? step : exact;
    ptrdiff_t end = step;
    if (turn < step)
        __asm__("" : "+r"(end)); /* else gcc unrolls this loop as well, for no gain */
    for (int i = 0; i < width * halves; i++)
        dot[i] = _mm256_setzero_si256();
#pragma GCC unroll 1
    for (ptrdiff_t first = 0; first < end; first += turn)
#pragma GCC unroll 4
        for (ptrdiff_t k = first; k < first + turn; k += exact) {
            const uint8_t *const at = codes + k * bits_of(kind) * LBQ_PANEL / 8;
            sum_columns(kind, table, at, exact, q + k * width, width, halves, dot);
        }
}

/* A step's sums are added to y after the next step's are computed. Adding them at once stalled the
 * core, 15 to 20 % of the time on Cascade Lake. */
LBQ_INLINE void
multiply_token(const code_kind kind, const ptrdiff_t step, const lookups *table,
               const lbq_panel *panel, const int8_t *q, progress *to)
{
    const uint8_t *codes = panel->codes;
    __m256i last[2], dot[2];
    bool started = false;
    for (ptrdiff_t left = panel->steps; left > 0; left--) {
        sum_step(kind, step, table, codes, q, 1, 2, dot);
        if (LBQ_LIKELY(started))
            add_sums(to, panel, 1, 0, 2, last);
        started = true;
        last[0] = dot[0];
        last[1] = dot[1];
        codes += panel->step_bytes;
        q += step;
    }
    if (started)
        add_sums(to, panel, 1, 0, 2, last);
}

/* No such delay here: the sums of four tokens leave no register for those of the previous step. */
LBQ_INLINE void
multiply_four(const code_kind kind, const ptrdiff_t step, const lookups *table,
              const lbq_panel *panel, const int8_t *q, progress *to)
{
    const uint8_t *codes = panel->codes;
    for (ptrdiff_t left = panel->steps; left > 0; left--) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256i dot[4];
            sum_step(kind, step, table, codes + 32 * half, q, 4, 1, dot);
            add_sums(to, panel, 4, half, 1, dot);
        }
        codes += panel->step_bytes;
        q += 4 * step;
    }
}

/* A panel whose steps have `step` columns. */
LBQ_INLINE void
gemv(const code_kind kind, const ptrdiff_t step, const int width, const lbq_panel *panel,
     const lbq_activations *x, float *y)
{
    const lookups table = lookups_of(kind, panel);
    progress sum = start(panel, x->factors, width, width);
    if (width == 1)
        multiply_token(kind, step, &table, panel, x->values, &sum);
    else
        multiply_four(kind, step, &table, panel, x->values, &sum);
    store(&sum, width, y);
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
    else if (kind != U3 && kind != T3)
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
lbq_gemv_u2_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U2, panel, x, y);
}

void
lbq_gemv_u3_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U3, panel, x, y);
}

void
lbq_gemv_u4_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U4, panel, x, y);
}

void
lbq_gemv_u8_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(U8, panel, x, y);
}

void
lbq_gemv_t2_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(T2, panel, x, y);
}

void
lbq_gemv_t3_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(T3, panel, x, y);
}

void
lbq_gemv_t4_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    gemv_any(T4, panel, x, y);
}
