/* An unpacked panel times four tokens at a time: eight 16-bit sums in registers.
 *
 * Codes of few bits sum up in 16 bits over many columns before they are widened: 128 of 1 or 2
 * bits, 64 of 3, 32 of 4. 8-bit codes are two 4-bit ones. */
#include <string.h>

#include "kernels/avx2/avx2.h"
#include "kernels/avx2/panel_avx2.h"

enum { TOKENS = 4 };

/* Which bits of a code are multiplied. */
typedef enum { WHOLE, LOW, HIGH } code_part;

LBQ_INLINE __m256i
load_codes(const uint8_t *at, const code_part part)
{
    __m256i codes = _mm256_loadu_si256((const __m256i *)at);
    if (part == HIGH)
        codes = _mm256_srli_epi16(codes, 4);
    return part == WHOLE ? codes : _mm256_and_si256(codes, _mm256_set1_epi8(15));
}

/* 16-bit sums of `columns` columns, as [half][token]. */
LBQ_INLINE void
sum_columns(const code_part part, const uint8_t *codes, const int8_t *q, ptrdiff_t columns,
            __m256i sum[2][TOKENS])
{
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
        sum[0][t] = sum[1][t] = _mm256_setzero_si256();
    do {
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            const __m256i upper = load_codes(codes + 64 * i, part);
            const __m256i lower = load_codes(codes + 64 * i + 32, part);
#pragma GCC unroll 4
            for (int t = 0; t < TOKENS; t++) {
                const __m256i word = broadcast_word(q + 4 * (LBQ_TILE * i + t));
                add_products(&sum[0][t], upper, word);
                add_products(&sum[1][t], lower, word);
            }
        }
        codes += 16 * LBQ_PANEL;
        q += 16 * LBQ_TILE;
        columns -= 16;
    } while (columns > 0);
}

/* dot = factor * the 32-bit sums, or that much more. */
LBQ_INLINE void
widen_sums(__m256i sum[2][TOKENS], int factor, const int more, __m256i dot[2][TOKENS])
{
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
            const __m256i part = widen(sum[half][t], factor);
            dot[half][t] = more ? _mm256_add_epi32(dot[half][t], part) : part;
        }
}

/* The integer sums of a step of four tokens, `exact` columns at a time. */
LBQ_INLINE void
sum_step(const int nibbles, ptrdiff_t exact, ptrdiff_t step, const uint8_t *codes, const int8_t *q,
         __m256i dot[2][TOKENS])
{
    const ptrdiff_t columns = step < exact ? step : exact;
    __m256i sum[2][TOKENS];
    sum_columns(nibbles ? LOW : WHOLE, codes, q, columns, sum);
    widen_sums(sum, 1, 0, dot);
    if (!nibbles && step <= exact)
        return;
    for (ptrdiff_t k = 0; k < step; k += columns) {
        const uint8_t *const from = codes + k * LBQ_PANEL;
        if (k > 0) {
            sum_columns(nibbles ? LOW : WHOLE, from, q + k * LBQ_TILE, columns, sum);
            widen_sums(sum, 1, 1, dot);
        }
        if (nibbles) {
            sum_columns(HIGH, from, q + k * LBQ_TILE, columns, sum);
            widen_sums(sum, 16, 1, dot);
        }
    }
}

/* One step of a panel times four tokens of a tile; y and the factors are those of the first. */
LBQ_INLINE void
multiply_step(const int nibbles, ptrdiff_t exact, const lbq_panel *panel, const uint8_t *codes,
              ptrdiff_t s, const int8_t *q, const float *factors, float *y)
{
    __m256i dot[2][TOKENS];
    sum_step(nibbles, exact, panel->step, codes, q, dot);
    const uint8_t *const scale_at = panel->scale + s * panel->scale_stride;
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++) {
        const __m256 scale = load_scale(panel, scale_at, half);
        float *const to = y + half * HALF;
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
            const __m256 before = _mm256_loadu_ps(to + t * LBQ_PANEL);
            const __m256 sum = add_step(factors + t, LBQ_TILE, scale, dot[half][t], before);
            _mm256_storeu_ps(to + t * LBQ_PANEL, sum);
        }
        if (!panel->has_offset)
            continue;
        const __m256 offset = load_half(scale_at + 2 * LBQ_PANEL + 2 * HALF * half);
#pragma GCC unroll 4
        for (int t = 0; t < TOKENS; t++) {
            const __m256 before = _mm256_loadu_ps(to + t * LBQ_PANEL);
            _mm256_storeu_ps(to + t * LBQ_PANEL, add_offset(factors + t, LBQ_TILE, offset, before));
        }
    }
}

LBQ_INLINE void
gemm(const int nibbles, ptrdiff_t exact, const lbq_panel *panel, ptrdiff_t count,
     const uint8_t *codes, ptrdiff_t first, ptrdiff_t end, const lbq_activations *x, float *y)
{
    const ptrdiff_t step = panel->step;
    for (ptrdiff_t p = 0; p < count; p++, y += LBQ_TILE * LBQ_PANEL)
        for (ptrdiff_t s = first; s < end; s++, codes += step * LBQ_PANEL) {
            const int8_t *const q = x->values + s * step * LBQ_TILE;
            const float *const factors = x->factors + 3 * s * LBQ_TILE;
            for (int t = 0; t < LBQ_TILE; t += TOKENS)
                multiply_step(
                    nibbles, exact, &panel[p], codes, s, q + 4 * t, factors + t, y + t * LBQ_PANEL);
        }
}

void
lbq_gemm_u8_i8_avx2(const lbq_panel *panel, ptrdiff_t count, int bits, const uint8_t *codes,
                    ptrdiff_t first, ptrdiff_t end, const lbq_activations *x, float *y)
{
    if (first == 0)
        memset(y, 0, sizeof(float) * (size_t)(count * LBQ_TILE * LBQ_PANEL));
    const ptrdiff_t exact = bits <= 2 ? 128 : bits == 3 ? 64 : 32; /* columns in 16 bits */
    if (bits == 8)
        gemm(1, exact, panel, count, codes, first, end, x, y);
    else
        gemm(0, exact, panel, count, codes, first, end, x, y);
}
