/* Rounds eight numbers to float16 in a given direction, as round_f16 does. */
#ifndef LBQ_HALVE_AVX2_H
#define LBQ_HALVE_AVX2_H

#include <immintrin.h>
#include <stdint.h>

static inline __m128i
lbq_halve_avx2(const float *x, int direction)
{
    const __m256 least = _mm256_set1_ps(-65504), most = _mm256_set1_ps(65504);
    const __m256 in = _mm256_min_ps(_mm256_max_ps(_mm256_loadu_ps(x), least), most);
    return direction < 0    ? _mm256_cvtps_ph(in, _MM_FROUND_TO_NEG_INF)
           : direction == 0 ? _mm256_cvtps_ph(in, _MM_FROUND_TO_NEAREST_INT)
                            : _mm256_cvtps_ph(in, _MM_FROUND_TO_POS_INF);
}

/* The halves, and their values. */
static inline void
lbq_halve_rows_avx2(const float *x, int direction, uint8_t *half, float *value)
{
    const __m128i bits = lbq_halve_avx2(x, direction);
    _mm_storeu_si128((__m128i *)half, bits);
    _mm256_storeu_ps(value, _mm256_cvtph_ps(bits));
}

#endif
