/* float16 to float32 with F16C, eight at a time. */
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
