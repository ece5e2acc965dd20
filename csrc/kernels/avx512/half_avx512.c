/* float32 to float16. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/lanes_avx512.h"

void
lbq_narrow_f16_avx512(const float *x, ptrdiff_t count, uint16_t *y)
{
    for (ptrdiff_t i = 0; i < count; i += 16) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        const __m512 in = _mm512_maskz_loadu_ps(mask, x + i);
        _mm256_mask_storeu_epi16(y + i, mask, _mm512_cvtps_ph(in, _MM_FROUND_TO_NEAREST_INT));
    }
}
