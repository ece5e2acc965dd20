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

/* Leaves only those, once both halves of the panel are loaded. */
#define TAKE_WHOLE ""
#define TAKE_LOW "vpand %[mask], %[upper], %[upper]\n\tvpand %[mask], %[lower], %[lower]\n\t"
#define TAKE_HIGH "vpsrlw $4, %[upper], %[upper]\n\tvpsrlw $4, %[lower], %[lower]\n\t" TAKE_LOW

/* Word t of the tile times both halves; `k` counts words of k since the top of the loop. */
#define TOKEN(k, t)                                                                                \
    "vpbroadcastd 32*" #k "+4*" #t "(%[q]), %[word]\n\t"                                           \
    "vpmaddubsw %[word], %[upper], %[product]\n\t"                                                 \
    "vpmaddubsw %[word], %[lower], %[word]\n\t"                                                    \
    "vpaddw %[product], %[upper" #t "], %[upper" #t "]\n\t"                                        \
    "vpaddw %[word], %[lower" #t "], %[lower" #t "]\n\t"
#define COLUMNS(k, TAKE)                                                                           \
    "vmovdqu 64*" #k "(%[codes]), %[upper]\n\t"                                                    \
    "vmovdqu 64*" #k "+32(%[codes]), %[lower]\n\t" TAKE                                            \
    TOKEN(k, 0) TOKEN(k, 1) TOKEN(k, 2) TOKEN(k, 3)
#define SUM_COLUMNS(TAKE)                                                                          \
    __asm__("1:\n\t" COLUMNS(0, TAKE) COLUMNS(1, TAKE) COLUMNS(2, TAKE)                            \
                COLUMNS(3, TAKE) "add $256, %[codes]\n\t"                                          \
                                 "add $128, %[q]\n\t"                                              \
                                 "sub $16, %[columns]\n\t"                                         \
                                 "jnz 1b\n\t"                                                      \
            : [codes] "+r"(codes),                                                                 \
              [q] "+r"(q),                                                                         \
              [columns] "+r"(columns),                                                             \
              [upper0] "+x"(sum[0][0]),                                                            \
              [upper1] "+x"(sum[0][1]),                                                            \
              [upper2] "+x"(sum[0][2]),                                                            \
              [upper3] "+x"(sum[0][3]),                                                            \
              [lower0] "+x"(sum[1][0]),                                                            \
              [lower1] "+x"(sum[1][1]),                                                            \
              [lower2] "+x"(sum[1][2]),                                                            \
              [lower3] "+x"(sum[1][3]),                                                            \
              [upper] "=&x"(upper),                                                                \
              [lower] "=&x"(lower),                                                                \
              [word] "=&x"(word),                                                                  \
              [product] "=&x"(product)                                                             \
            : [mask] "x"(_mm256_set1_epi8(15))                                                     \
            : "memory", "cc")

/* 16-bit sums of `columns` columns, as [half][token]. In assembly, because gcc 12 spills one of
 * them and moves others from register to register. */
LBQ_INLINE void
sum_columns(const code_part part, const uint8_t *codes, const int8_t *q, ptrdiff_t columns,
            __m256i sum[2][TOKENS])
{
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++)
        sum[0][t] = sum[1][t] = _mm256_setzero_si256();
    __m256i upper, lower, word, product;
    if (part == WHOLE)
        SUM_COLUMNS(TAKE_WHOLE);
    else if (part == LOW)
        SUM_COLUMNS(TAKE_LOW);
    else
        SUM_COLUMNS(TAKE_HIGH);
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

/* The integer sums of a step of four tokens: at `once`, or `exact` columns at a time. */
LBQ_INLINE void
sum_step(const int nibbles, const int once, ptrdiff_t exact, ptrdiff_t step, const uint8_t *codes,
         const int8_t *q, __m256i dot[2][TOKENS])
{
    const ptrdiff_t columns = once || step < exact ? step : exact;
    __m256i sum[2][TOKENS];
    sum_columns(nibbles ? LOW : WHOLE, codes, q, columns, sum);
    widen_sums(sum, 1, 0, dot);
    if (once)
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

/* y of four tokens plus their sums of a step; y and the factors are those of the first. */
LBQ_INLINE void
add_sums(__m256i dot[2][TOKENS], const __m256 scale[2], const __m256 offset[2],
         const int has_offset, const float *factors, float *y)
{
#pragma GCC unroll 4
    for (int t = 0; t < TOKENS; t++, y += LBQ_PANEL)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m256 sum = _mm256_loadu_ps(y + half * HALF);
            sum = add_step(factors + t, LBQ_TILE, scale[half], dot[half][t], sum);
            if (has_offset)
                sum = add_offset(factors + t, LBQ_TILE, offset[half], sum);
            _mm256_storeu_ps(y + half * HALF, sum);
        }
}

LBQ_INLINE void
gemm(const int nibbles, const int once, ptrdiff_t exact, const lbq_panel *panel, ptrdiff_t count,
     const uint8_t *codes, ptrdiff_t first, ptrdiff_t end, const lbq_activations *x, float *y)
{
    const ptrdiff_t step = panel->step;
    for (ptrdiff_t p = 0; p < count; p++, panel++, y += LBQ_TILE * LBQ_PANEL)
        for (ptrdiff_t s = first; s < end; s++, codes += step * LBQ_PANEL) {
            const int8_t *const q = x->values + s * step * LBQ_TILE;
            const float *const factors = x->factors + 3 * s * LBQ_TILE;
            const uint8_t *const scale_at = panel->scale + s * panel->scale_stride;
            /* Before the sums, which its branches would drive from their registers. */
            const __m256 scale[2] = {load_scale(panel, scale_at, 0),
                                     load_scale(panel, scale_at, 1)};
            __m256 offset[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int half = 0; panel->has_offset && half < 2; half++)
                offset[half] = load_half(scale_at + 2 * LBQ_PANEL + 2 * HALF * half);
#pragma GCC unroll 2
            for (int t = 0; t < LBQ_TILE; t += TOKENS) {
                __m256i dot[2][TOKENS];
                sum_step(nibbles, once, exact, step, codes, q + 4 * t, dot);
                if (panel->has_offset)
                    add_sums(dot, scale, offset, 1, factors + t, y + t * LBQ_PANEL);
                else
                    add_sums(dot, scale, offset, 0, factors + t, y + t * LBQ_PANEL);
            }
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
        gemm(1, 0, exact, panel, count, codes, first, end, x, y);
    else if (panel->step <= exact)
        gemm(0, 1, exact, panel, count, codes, first, end, x, y);
    else
        gemm(0, 0, exact, panel, count, codes, first, end, x, y);
}

/* The AVX-512 kernel says why it looks ahead. */
void
lbq_store_tile_avx2(const float *sums, ptrdiff_t count, ptrdiff_t tokens, ptrdiff_t stride,
                    float *y)
{
    for (ptrdiff_t t = 0; t < tokens; t++, y += stride)
        for (ptrdiff_t p = 0; p < count; p++) {
            const float *const from = sums + (p * LBQ_TILE + t) * LBQ_PANEL;
            float *const to = y + p * LBQ_PANEL;
            _mm256_storeu_ps(to, _mm256_load_ps(from));
            _mm256_storeu_ps(to + 8, _mm256_load_ps(from + 8));
            _mm_prefetch((const char *)(to + LBQ_TILE * stride), _MM_HINT_T0);
        }
}
