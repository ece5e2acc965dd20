/* 1-bit panels times int8 activations of a few tokens, by looking up sums of four activations.
 *
 * Four codes of a row index the 16 sums that they can select (list.h), and vpshufb looks up 16 rows
 * at once. Sums come in two parts of at most 60, so that four of them fit in a byte; vpmaddubsw
 * then widens low + 16 * high to 16 bits. The results are exact, unlike those of J. Wei et al.,
 * "T-MAC: CPU Renaissance via Table Lookup for Low-Bit LLM Deployment on Edge", 2024, whose tables
 * are rounded to 8 bits. A block of 512 weights takes 26 instructions instead of 54. */
#include <stdbool.h>

#include "kernels/avx2/avx2.h"
#include "kernels/avx2/gemv_avx2.h"

enum {
    AHEAD = 4096,     /* bytes: the hardware prefetcher stops at page ends */
    COLUMNS = 32,     /* of a block */
    SUMS = 256,       /* bytes of sums for a block */
    HIGH = 128,       /* where the second part begins */
    EXCESS = 16 * 256 /* that it adds to a block's sum: 32 in each of 8 sums */
};

LBQ_INLINE __m256i
load(const uint8_t *at)
{
    return _mm256_loadu_si256((const __m256i *)at);
}

/* One part of the sums of a block, four of them added. */
LBQ_INLINE __m256i
look_up(const __m256i index[4], const uint8_t *sums)
{
    const __m256i first = _mm256_add_epi8(_mm256_shuffle_epi8(load(sums), index[0]),
                                          _mm256_shuffle_epi8(load(sums + 32), index[1]));
    const __m256i second = _mm256_add_epi8(_mm256_shuffle_epi8(load(sums + 64), index[2]),
                                           _mm256_shuffle_epi8(load(sums + 96), index[3]));
    return _mm256_add_epi8(first, second);
}

/* The integer sums of a step: upper and lower half of the panel. */
LBQ_INLINE void
sum_step(const uint8_t *codes, const ptrdiff_t step, const uint8_t *sums, __m256i dot[2])
{
    const __m256i nibble = _mm256_set1_epi8(15), weight = _mm256_set1_epi16(0x1001);
    const __m128i less = _mm_set1_epi16((short)(-step / COLUMNS * EXCESS));
    __m256i upper = _mm256_zextsi128_si256(less), lower = upper;
#pragma GCC unroll 4
    for (ptrdiff_t k = 0; k < step; k += COLUMNS, codes += 64, sums += SUMS) {
        _mm_prefetch((const char *)codes + AHEAD, _MM_HINT_T0);
        const __m256i a = load(codes), b = load(codes + 32);
        const __m256i index[4] = {
            _mm256_and_si256(a, nibble),
            _mm256_and_si256(b, nibble),
            _mm256_and_si256(_mm256_srli_epi16(a, 4), nibble),
            _mm256_and_si256(_mm256_srli_epi16(b, 4), nibble),
        };
        const __m256i low = look_up(index, sums), high = look_up(index, sums + HIGH);
        add_products(&upper, _mm256_unpacklo_epi8(low, high), weight);
        add_products(&lower, _mm256_unpackhi_epi8(low, high), weight);
    }
    const __m256i halves[2] = {upper, lower};
    for (int h = 0; h < 2; h++) {
        const __m128i sum = _mm_add_epi16(_mm256_castsi256_si128(halves[h]),
                                          _mm256_extracti128_si256(halves[h], 1));
        dot[h] = _mm256_cvtepi16_epi32(sum);
    }
}

/* A panel whose steps have `step` columns, times token t of x. A step's sums are added to y after
 * the next step's are computed, as in gemv_avx2.c. */
LBQ_INLINE void
multiply_token(const ptrdiff_t step, const lbq_panel *panel, const lbq_activations *x, ptrdiff_t t,
               float *y)
{
    const ptrdiff_t step_sums = step / COLUMNS * SUMS;
    const uint8_t *codes = panel->codes, *sums = x->sums + t * panel->steps * step_sums;
    progress sum = start(panel, x->factors + t, x->width, 1);
    __m256i last[2], dot[2];
    bool started = false;
    for (ptrdiff_t left = panel->steps; left > 0; left--) {
        sum_step(codes, step, sums, dot);
        if (LBQ_LIKELY(started))
            add_sums(&sum, panel, 1, 0, 2, last);
        started = true;
        last[0] = dot[0];
        last[1] = dot[1];
        codes += panel->step_bytes;
        sums += step_sums;
    }
    if (started)
        add_sums(&sum, panel, 1, 0, 2, last);
    store(&sum, 1, y);
}

/* Instruction fetch limits the loop, and constant steps need fewer instructions. */
void
lbq_gemv_u1_i8_avx2(const lbq_panel *panel, const lbq_activations *x, float *y)
{
    for (ptrdiff_t t = 0; t < x->width; t++, y += LBQ_PANEL)
        if (panel->step == 128)
            multiply_token(128, panel, x, t, y);
        else if (panel->step == 64)
            multiply_token(64, panel, x, t, y);
        else
            multiply_token(32, panel, x, t, y);
}
