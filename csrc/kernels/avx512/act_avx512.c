/* Activations to int8, a step of up to 128 columns held in registers. */
#include <immintrin.h>
#include <math.h>

#include "kernels/avx512/avx512.h"

enum { LANES = 16, VECTORS = LBQ_MAX_STEP / LANES };

static inline __attribute__((always_inline)) void
quantize_step(const float *x, ptrdiff_t count, const int vectors, int limit, int8_t *q,
              float *scale, float *total)
{
    __m512 value[VECTORS];
    __m512i top = _mm512_setzero_si512();
    for (int v = 0; v < vectors; v++) {
        const ptrdiff_t left = count - v * LANES;
        const __mmask16 mask =
            left >= LANES ? 0xffff : (__mmask16)((1u << (left < 0 ? 0 : left)) - 1);
        value[v] = _mm512_maskz_loadu_ps(mask, x + v * LANES);
        const __m512i bits = _mm512_castps_si512(_mm512_abs_ps(value[v]));
        top = _mm512_max_epi32(top, bits);
    }
    const int32_t largest_bits = _mm512_reduce_max_epi32(top);
    const float largest = _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(largest_bits)));
    if (!(largest >= 0x1p-100f && largest < INFINITY)) {
        for (int v = 0; v < vectors; v++)
            _mm_storeu_si128((__m128i *)(q + v * LANES), _mm_setzero_si128());
        *scale = *total = largest_bits >= 0x7f800000 ? NAN : 0;
        return;
    }
    const __m512 inverse = _mm512_set1_ps((float)limit / largest);
    __m512i sum = _mm512_setzero_si512();
    for (int v = 0; v < vectors; v++) {
        const __m512i code = _mm512_cvt_roundps_epi32(
            _mm512_mul_ps(value[v], inverse), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        sum = _mm512_add_epi32(sum, code);
        _mm_storeu_si128((__m128i *)(q + v * LANES), _mm512_cvtepi32_epi8(code));
    }
    *scale = largest / (float)limit;
    *total = *scale * (float)_mm512_reduce_add_epi32(sum);
}

void
lbq_quantize_i8_avx512(const float *x, ptrdiff_t cols, ptrdiff_t step, int limit, int8_t *q,
                       float *scale, float *total)
{
    for (ptrdiff_t begin = 0, s = 0; begin < cols; begin += step, s++) {
        const ptrdiff_t count = cols - begin < step ? cols - begin : step;
        if (step == 64)
            quantize_step(x + begin, count, 4, limit, q + begin, scale + s, total + s);
        else if (step == 128)
            quantize_step(x + begin, count, 8, limit, q + begin, scale + s, total + s);
        else if (step == 32)
            quantize_step(x + begin, count, 2, limit, q + begin, scale + s, total + s);
        else
            quantize_step(x + begin, count, 1, limit, q + begin, scale + s, total + s);
    }
}
