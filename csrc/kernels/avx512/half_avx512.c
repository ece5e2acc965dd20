/* float16 to and from float32, from float64, and grids of float16. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/lanes_avx512.h"

void
lbq_widen_f16_avx512(const uint16_t *x, ptrdiff_t count, float *y)
{
    for (ptrdiff_t i = 0; i < count; i += 16) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        const __m256i half = _mm256_maskz_loadu_epi16(mask, x + i);
        _mm512_mask_storeu_ps(y + i, mask, _mm512_cvtph_ps(half));
    }
}

void
lbq_narrow_f16_avx512(const float *x, ptrdiff_t count, uint16_t *y)
{
    for (ptrdiff_t i = 0; i < count; i += 16) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        const __m512 in = _mm512_maskz_loadu_ps(mask, x + i);
        _mm256_mask_storeu_epi16(y + i, mask, _mm512_cvtps_ph(in, _MM_FROUND_TO_NEAREST_INT));
    }
}

#define NARROW(x, mode) _mm256_cvtps_ph(_mm512_cvt_roundpd_ps(x, (mode) | _MM_FROUND_NO_EXC), mode)

static inline __m512d
saturate(__m512d x)
{
    return _mm512_min_pd(_mm512_max_pd(x, _mm512_set1_pd(-65504)), _mm512_set1_pd(65504));
}

void
lbq_round_f16_avx512(const double *x, int direction, uint16_t *y)
{
    for (int i = 0; i < LBQ_PANEL; i += 8) {
        const __m512d in = saturate(_mm512_loadu_pd(x + i));
        const __m128i half = direction < 0    ? NARROW(in, _MM_FROUND_TO_NEG_INF)
                             : direction == 0 ? NARROW(in, _MM_FROUND_TO_NEAREST_INT)
                                              : NARROW(in, _MM_FROUND_TO_POS_INF);
        _mm_storeu_si128((__m128i *)(y + i), half);
    }
}

static inline __m512d
widen(__m128i half)
{
    return _mm512_cvtps_pd(_mm256_cvtph_ps(half));
}

static inline __m512d
scale_from(__m512d x)
{
    const __m512d half = widen(NARROW(saturate(x), _MM_FROUND_TO_POS_INF));
    return _mm512_max_pd(half, _mm512_set1_pd(0x1p-24));
}

static inline __m512d
clipped(const float *x, double clip)
{
    const __m512d wide = _mm512_mul_pd(_mm512_set1_pd(clip), _mm512_cvtps_pd(_mm256_loadu_ps(x)));
    return _mm512_add_pd(wide, _mm512_setzero_pd()); /* lest zero be -0 */
}

void
lbq_cover_f16_avx512(const float *low, const float *high, double clip, int top, float *scale,
                     float *offset)
{
    const __m512d steps = _mm512_set1_pd(top);
    for (int i = 0; i < LBQ_PANEL; i += 8) {
        const __m512d least = clipped(low + i, clip), most = clipped(high + i, clip);
        const __m512d from = widen(NARROW(saturate(least), _MM_FROUND_TO_NEG_INF));
        const __m512d narrow = scale_from(_mm512_div_pd(_mm512_sub_pd(most, least), steps));
        const __m512d wide = scale_from(_mm512_div_pd(_mm512_sub_pd(most, from), steps));
        const __m512d end = _mm512_add_pd(from, _mm512_mul_pd(steps, narrow));
        const __mmask8 short_of_it = _mm512_cmp_pd_mask(end, most, _CMP_LT_OQ);
        const __m512d step = _mm512_mask_mov_pd(narrow, short_of_it, wide);
        _mm256_storeu_ps(scale + i, _mm512_cvtpd_ps(step));
        _mm256_storeu_ps(offset + i, _mm512_cvtpd_ps(from));
    }
}
