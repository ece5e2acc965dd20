/* float16 to float32, sixteen at a time. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"

void
lbq_widen_f16_avx512(const uint16_t *x, ptrdiff_t count, float *y)
{
    for (ptrdiff_t i = 0; i < count; i += 16) {
        const __mmask16 mask = count - i >= 16 ? 0xffff : (__mmask16)((1u << (count - i)) - 1);
        const __m256i half = _mm256_maskz_loadu_epi16(mask, x + i);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_cvtph_ps(half));
    }
}
