/* An unpacked panel times four tokens at a time: eight sums in registers.
 *
 * Products of codes with few bits are summed in 16 bits before widening: over 128 columns for 1 or
 * 2 bits, 64 for 3, 32 for 4. 8-bit codes are multiplied in 16 bits, even and odd ones in turn, and
 * summed in 32. Splitting them into two 4-bit halves took a third longer: the same number of
 * products, and sums to widen every 32 columns. Widening them to 16 bits beforehand, once for all
 * tiles, was no faster. */
#include <string.h>

#include "kernels/avx2/avx2.h"
#include "kernels/avx2/panel_avx2.h"

enum { TOKENS = 4 };

/* Codes of both halves of the panel: word `w` of the loop's four; or the even or odd ones in half a
 * word of 8-bit codes, in 16 bits each. */
/* clang-format off */
#define LOAD_WHOLE(w)                                                                              \
    "vmovdqu 64*" #w "(%[codes],%[at],2), %[upper]\n\t"                                            \
    "vmovdqu 64*" #w "+32(%[codes],%[at],2), %[lower]\n\t"
#define LOAD_HALF(w)                                                                               \
    "vmovdqu 64*(" #w "/2)(%[codes],%[at]), %[upper]\n\t"                                          \
    "vmovdqu 64*(" #w "/2)+32(%[codes],%[at]), %[lower]\n\t"
#define LOAD_EVEN(w)                                                                               \
    LOAD_HALF(w) "vpand %[low], %[upper], %[upper]\n\tvpand %[low], %[lower], %[lower]\n\t"
#define LOAD_ODD(w)                                                                                \
    LOAD_HALF(w) "vpsrlw $8, %[upper], %[upper]\n\tvpsrlw $8, %[lower], %[lower]\n\t"

/* Their products with token t. */
#define MULTIPLY(KIND, w, t, first, second)                                                        \
    "vpbroadcastd 32*" #w "+4*" #t "(%[q],%[at]), %[word]\n\t"                                     \
    MULTIPLY_##KIND " %[word], %[upper], %[" #first "]\n\t"                                        \
    MULTIPLY_##KIND " %[word], %[lower], %[" #second "]\n\t"
#define ADD(KIND, first, second, t)                                                                \
    ADD_##KIND " %[" #first "], %[upper" #t "], %[upper" #t "]\n\t"                                \
    ADD_##KIND " %[" #second "], %[lower" #t "], %[lower" #t "]\n\t"
#define MULTIPLY_SMALL "vpmaddubsw"
#define ADD_SMALL "vpaddw"
#define MULTIPLY_BYTES "vpmaddwd"
#define ADD_BYTES "vpaddd"

/* A token's products are added two tokens later: adding them at once took 10 % longer on Cascade
 * Lake. */
#define TOKEN(KIND, w, t, first, second, before)                                                   \
    ADD(KIND, first, second, before) MULTIPLY(KIND, w, t, first, second)
#define FIRST(KIND, LOAD)                                                                          \
    LOAD(0) MULTIPLY(KIND, 0, 0, upper0, lower0) MULTIPLY(KIND, 0, 1, upper1, lower1)              \
    MULTIPLY(KIND, 0, 2, upper2, lower2) MULTIPLY(KIND, 0, 3, upper3, lower3)
#define SECOND(KIND, LOAD)                                                                         \
    LOAD(1) MULTIPLY(KIND, 1, 0, a, b) MULTIPLY(KIND, 1, 1, c, d)                                  \
    TOKEN(KIND, 1, 2, a, b, 0) TOKEN(KIND, 1, 3, c, d, 1)
#define NEXT(KIND, LOAD, w)                                                                        \
    LOAD(w) TOKEN(KIND, w, 0, a, b, 2) TOKEN(KIND, w, 1, c, d, 3)                                  \
    TOKEN(KIND, w, 2, a, b, 0) TOKEN(KIND, w, 3, c, d, 1)
#define SUM(KIND, EVEN, ODD)                                                                       \
    FIRST(KIND, EVEN) SECOND(KIND, ODD) NEXT(KIND, EVEN, 2) NEXT(KIND, ODD, 3)                     \
    "add $128, %[at]\n\t"                                                                          \
    "jz 2f\n\t"                                                                                    \
    "1:\n\t"                                                                                       \
    NEXT(KIND, EVEN, 0) NEXT(KIND, ODD, 1) NEXT(KIND, EVEN, 2) NEXT(KIND, ODD, 3)                  \
    "add $128, %[at]\n\t"                                                                          \
    "jnz 1b\n\t"                                                                                   \
    "2:\n\t"                                                                                       \
    ADD(KIND, a, b, 2) ADD(KIND, c, d, 3)
/* clang-format on */
#define RUN(SUM)                                                                                   \
    __asm__(SUM                                                                                    \
            : [at] "+r"(at),                                                                       \
              [upper0] "=&x"(sum[0][0]),                                                           \
              [upper1] "=&x"(sum[0][1]),                                                           \
              [upper2] "=&x"(sum[0][2]),                                                           \
              [upper3] "=&x"(sum[0][3]),                                                           \
              [lower0] "=&x"(sum[1][0]),                                                           \
              [lower1] "=&x"(sum[1][1]),                                                           \
              [lower2] "=&x"(sum[1][2]),                                                           \
              [lower3] "=&x"(sum[1][3]),                                                           \
              [upper] "=&x"(upper),                                                                \
              [lower] "=&x"(lower),                                                                \
              [word] "=&x"(word),                                                                  \
              [a] "=&x"(a),                                                                        \
              [b] "=&x"(b),                                                                        \
              [c] "=&x"(c),                                                                        \
              [d] "=&x"(d)                                                                         \
            : [codes] "r"(codes), [q] "r"(q), [low] "m"(LOW)                                       \
            : "memory", "cc")

static const _Alignas(32) uint32_t LOW[8] = {
    0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff, 0xff00ff};

/* Sums of `columns` columns as [half][token]: in 16 bits, or in 32 for bytes, with spread
 * activations. In assembly, because gcc 12 spills one sum and moves others between registers. */
LBQ_INLINE void
sum_columns(const int bytes, const uint8_t *codes, const int8_t *q, ptrdiff_t columns,
            __m256i sum[2][TOKENS])
{
    const ptrdiff_t size = columns * LBQ_TILE * (bytes ? 2 : 1);
    ptrdiff_t at = -size;
    codes += columns * LBQ_PANEL;
    q += size;
    __m256i upper, lower, word, a, b, c, d;
    if (bytes)
        RUN(SUM(BYTES, LOAD_EVEN, LOAD_ODD));
    else
        RUN(SUM(SMALL, LOAD_WHOLE, LOAD_WHOLE));
}

/* Widens a step of activations to 16 bits: for every four columns the even ones of all tokens, then
 * the odd ones. */
LBQ_INLINE void
spread(const int8_t *q, ptrdiff_t columns, int8_t *wide)
{
    for (ptrdiff_t k = 0; k < columns; k += 4, q += 32, wide += 64) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)q);
        const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16(both, 8), 8);
        _mm256_store_si256((__m256i *)wide, even);
        _mm256_store_si256((__m256i *)(wide + 32), _mm256_srai_epi16(both, 8));
    }
}

/* The integer sums of a step for four tokens, `exact` columns at a time. */
LBQ_INLINE void
sum_step(const int bytes, const int once, ptrdiff_t exact, ptrdiff_t step, const uint8_t *codes,
         const int8_t *q, __m256i dot[2][TOKENS])
{
    if (bytes) {
        sum_columns(1, codes, q, step, dot);
        return;
    }
    __m256i sum[2][TOKENS];
    sum_columns(0, codes, q, once ? step : exact, sum);
    for (int i = 0; i < 2 * TOKENS; i++)
        dot[i / TOKENS][i % TOKENS] = widen(sum[i / TOKENS][i % TOKENS], 1);
    for (ptrdiff_t k = exact; !once && k < step; k += exact) {
        sum_columns(0, codes + k * LBQ_PANEL, q + k * LBQ_TILE, exact, sum);
        for (int i = 0; i < 2 * TOKENS; i++) {
            __m256i *const to = &dot[i / TOKENS][i % TOKENS];
            *to = _mm256_add_epi32(*to, widen(sum[i / TOKENS][i % TOKENS], 1));
        }
    }
}

/* Adds the sums of a step to y of four tokens; y and factors point to the first. */
LBQ_INLINE void
add_sums(__m256i dot[2][TOKENS], const __m256 scale[2], const __m256 offset[2],
         const int has_offset, const float *factors, float *restrict y)
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
gemm(const int bytes, const int once, ptrdiff_t exact, const lbq_panel *panel, ptrdiff_t count,
     const uint8_t *codes, ptrdiff_t first, ptrdiff_t end, const lbq_activations *x, float *y)
{
    const ptrdiff_t step = panel->step, other = (end - first) * step * LBQ_PANEL;
    _Alignas(32) int8_t wide[2 * LBQ_MAX_STEP * LBQ_TILE];
    for (ptrdiff_t s = first; s < end; s++, codes += step * LBQ_PANEL) {
        const float *const factors = x->factors + 3 * s * LBQ_TILE;
        const int8_t *q = x->values + s * step * LBQ_TILE;
        if (bytes) {
            spread(q, step, wide);
            q = wide;
        }
        for (ptrdiff_t p = 0; p < count; p++) {
            const uint8_t *const scale_at = panel[p].scale + s * panel[p].scale_stride;
            /* Loaded before the sums, which its branches would spill. */
            const __m256 scale[2] = {load_scale(&panel[p], scale_at, 0),
                                     load_scale(&panel[p], scale_at, 1)};
            __m256 offset[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
            for (int half = 0; panel->has_offset && half < 2; half++)
                offset[half] = load_half(scale_at + 2 * LBQ_PANEL + 2 * HALF * half);
#pragma GCC unroll 2
            for (int t = 0; t < LBQ_TILE; t += TOKENS) {
                __m256i dot[2][TOKENS];
                sum_step(bytes, once, exact, step, codes + p * other, q + 4 * t, dot);
                float *const to = y + (p * LBQ_TILE + t) * LBQ_PANEL;
                if (panel->has_offset)
                    add_sums(dot, scale, offset, 1, factors + t, to);
                else
                    add_sums(dot, scale, offset, 0, factors + t, to);
            }
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
        gemm(1, 1, exact, panel, count, codes, first, end, x, y);
    else if (panel->step <= exact)
        gemm(0, 1, exact, panel, count, codes, first, end, x, y);
    else
        gemm(0, 0, exact, panel, count, codes, first, end, x, y);
}

/* The AVX-512 kernel explains the prefetch. */
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
