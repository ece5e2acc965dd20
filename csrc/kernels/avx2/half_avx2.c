/* float16 to and from float32 with F16C. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"

void
lbq_widen_f16_avx2(const uint16_t *x, ptrdiff_t count, float *y)
{
    ptrdiff_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(x + i))));
    for (; i < count; i++)
        y[i] = _cvtsh_ss(x[i]);
}

void
lbq_narrow_f16_avx2(const float *x, ptrdiff_t count, uint16_t *y)
{
    const int nearest = _MM_FROUND_TO_NEAREST_INT;
    ptrdiff_t i = 0;
    for (; i + 8 <= count; i += 8)
        _mm_storeu_si128((__m128i *)(y + i), _mm256_cvtps_ph(_mm256_loadu_ps(x + i), nearest));
    for (; i < count; i++)
        y[i] = _cvtss_sh(x[i], nearest);
}

void
lbq_round_f16_avx2(const float *x, int direction, float *y)
{
    const __m256 least = _mm256_set1_ps(-65504), most = _mm256_set1_ps(65504);
    for (int i = 0; i < LBQ_PANEL; i += 8) {
        const __m256 in = _mm256_min_ps(_mm256_max_ps(_mm256_loadu_ps(x + i), least), most);
        const __m128i half = direction < 0    ? _mm256_cvtps_ph(in, _MM_FROUND_TO_NEG_INF)
                             : direction == 0 ? _mm256_cvtps_ph(in, _MM_FROUND_TO_NEAREST_INT)
                                              : _mm256_cvtps_ph(in, _MM_FROUND_TO_POS_INF);
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(half));
    }
}
