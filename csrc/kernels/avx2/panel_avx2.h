/* The scales of half a panel, one per lane; the arithmetic after a step's integer sum. */
#ifndef LBQ_PANEL_AVX2_H
#define LBQ_PANEL_AVX2_H

#include <immintrin.h>

#include "kernels/kernels.h"

#define LBQ_INLINE static inline __attribute__((always_inline))

enum { HALF = LBQ_PANEL / 2 /* rows of a register */ };

/* Keeps gcc from reordering a chain of sums, which would need more registers than it has. */
#define LBQ_BARRIER(sum) __asm__("" : "+x"(sum))

/* Keeps the usual case inline; gcc would jump to it and back. */
#define LBQ_LIKELY(condition) __builtin_expect(condition, 1)

/* Four activations of one token in every lane: a load, no shuffle. */
LBQ_INLINE __m256i
broadcast_word(const int8_t *q)
{
    int32_t word;
    __builtin_memcpy(&word, q, sizeof word);
    return _mm256_set1_epi32(word);
}

/* sum += codes * activations in 16 bits, two products per lane. */
LBQ_INLINE void
add_products(__m256i *sum, __m256i codes, __m256i word)
{
    *sum = _mm256_add_epi16(*sum, _mm256_maddubs_epi16(codes, word));
    LBQ_BARRIER(*sum);
}

/* Widens 16-bit sums to 32 bits, times `factor`. */
LBQ_INLINE __m256i
widen(__m256i sum, int factor)
{
    return _mm256_madd_epi16(sum, _mm256_set1_epi16((short)factor));
}

LBQ_INLINE __m256
load_half(const uint8_t *at)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
}

/* The scales of rows 8 * half and up, for the step whose scales start at `at`. */
LBQ_INLINE __m256
load_scale(const lbq_panel *panel, const uint8_t *at, const int half)
{
    if (panel->scale_bits == 16)
        return load_half(at + 2 * HALF * half);
    const __m256 unit = _mm256_set1_ps(panel->unit);
    if (panel->scale_bits == 0)
        return unit;
    __m128i bytes;
    if (panel->scale_bits == 8) {
        bytes = _mm_loadl_epi64((const __m128i *)(at + HALF * half));
    } else {
        const __m128i pairs = _mm_loadu_si32(at + HALF / 2 * half), low = _mm_set1_epi8(15);
        const __m128i odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
        bytes = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), odd);
    }
    return _mm256_mul_ps(unit, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(bytes)));
}

/* Adds a step's integer sums `dot` to y of a token and half a panel; `factors` are the token's. */
LBQ_INLINE __m256
add_step(const float *factors, ptrdiff_t width, __m256 scale, __m256i dot, __m256 y)
{
    const __m256 sum = _mm256_fmadd_ps(
        _mm256_set1_ps(factors[0]), _mm256_cvtepi32_ps(dot), _mm256_set1_ps(factors[2 * width]));
    return _mm256_fmadd_ps(scale, sum, y);
}

/* Adds the offsets of a step to y. */
LBQ_INLINE __m256
add_offset(const float *factors, ptrdiff_t width, __m256 offset, __m256 y)
{
    return _mm256_fmadd_ps(offset, _mm256_set1_ps(factors[width]), y);
}

#endif
