/* float32 to float16 with F16C. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"
#include "kernels/avx2/halve_avx2.h"

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
    for (int i = 0; i < LBQ_PANEL; i += 8)
        _mm256_storeu_ps(y + i, _mm256_cvtph_ps(lbq_halve_avx2(x + i, direction)));
}
