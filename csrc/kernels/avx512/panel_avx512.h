/* The 16 scales and offsets of a step, one per lane; the arithmetic after a step's integer sum. */
#ifndef LBQ_PANEL_AVX512_H
#define LBQ_PANEL_AVX512_H

#include <immintrin.h>

#include "kernels/kernels.h"

#define LBQ_INLINE static inline __attribute__((always_inline))

/* Keeps the usual case inline; gcc would jump to it and back. */
#define LBQ_LIKELY(condition) __builtin_expect(condition, 1)

/* Four activations of one token in every lane: a load, no shuffle. */
LBQ_INLINE __m512i
broadcast_word(const int8_t *q)
{
    int32_t word;
    __builtin_memcpy(&word, q, sizeof word);
    return _mm512_set1_epi32(word);
}

LBQ_INLINE __m512
load_half(const uint8_t *at)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
}

/* The scales of the step whose scales start at `at`. */
LBQ_INLINE __m512
load_scale(const lbq_panel *panel, const uint8_t *at)
{
    if (LBQ_LIKELY(panel->scale_bits == 16))
        return load_half(at);
    const __m512 unit = _mm512_set1_ps(panel->unit);
    if (panel->scale_bits == 0)
        return unit;
    __m128i bytes;
    if (panel->scale_bits == 8) {
        bytes = _mm_loadu_si128((const __m128i *)at);
    } else {
        const __m128i pairs = _mm_loadl_epi64((const __m128i *)at), low = _mm_set1_epi8(15);
        const __m128i odd = _mm_and_si128(_mm_srli_epi16(pairs, 4), low);
        bytes = _mm_unpacklo_epi8(_mm_and_si128(pairs, low), odd);
    }
    return _mm512_mul_ps(unit, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)));
}

/* Adds a step's integer sums `dot` to y of a token and a panel; `factors` are the token's. */
LBQ_INLINE __m512
add_step(const float *factors, ptrdiff_t width, __m512 scale, __m512i dot, __m512 y)
{
    const __m512 sum = _mm512_fmadd_ps(
        _mm512_set1_ps(factors[0]), _mm512_cvtepi32_ps(dot), _mm512_set1_ps(factors[2 * width]));
    return _mm512_fmadd_ps(scale, sum, y);
}

/* Adds the offsets of a step to y. */
LBQ_INLINE __m512
add_offset(const float *factors, ptrdiff_t width, __m512 offset, __m512 y)
{
    return _mm512_fmadd_ps(offset, _mm512_set1_ps(factors[width]), y);
}

#endif
