/* float16 to and from float32 with F16C, from float64, and grids of float16. */
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

/* The next float in that direction, where `wrong`; none of them is 0 in between. */
static inline __m128
step(__m128 x, __m128i wrong, int direction)
{
    const __m128i bits = _mm_castps_si128(x), negative = _mm_srai_epi32(bits, 31);
    const __m128i away = _mm_or_si128(negative, _mm_set1_epi32(1)); /* upwards: 1 or -1 */
    const __m128i toward = direction > 0 ? away : _mm_sub_epi32(_mm_setzero_si128(), away);
    return _mm_castsi128_ps(_mm_add_epi32(bits, _mm_and_si128(toward, wrong)));
}

/* Four numbers as floats, rounded in that direction and within the range of float16. */
static inline __m128
narrow(__m256d x, int direction)
{
    const __m256i low_halves = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
    const __m256d least = _mm256_set1_pd(-65504), most = _mm256_set1_pd(65504);
    const __m256d in = _mm256_min_pd(_mm256_max_pd(x, least), most);
    const __m128 near = _mm256_cvtpd_ps(in);
    if (direction == 0)
        return near;
    const __m256d back = _mm256_cvtps_pd(near);
    const __m256d wide =
        direction < 0 ? _mm256_cmp_pd(back, in, _CMP_GT_OQ) : _mm256_cmp_pd(back, in, _CMP_LT_OQ);
    const __m128i wrong =
        _mm256_castsi256_si128(_mm256_permutevar8x32_epi32(_mm256_castpd_si256(wide), low_halves));
    return step(near, wrong, direction);
}

void
lbq_round_f16_avx2(const double *x, int direction, uint16_t *y)
{
    for (int i = 0; i < LBQ_PANEL; i += 4) {
        const __m128 near = narrow(_mm256_loadu_pd(x + i), direction);
        const __m128i half = direction < 0    ? _mm_cvtps_ph(near, _MM_FROUND_TO_NEG_INF)
                             : direction == 0 ? _mm_cvtps_ph(near, _MM_FROUND_TO_NEAREST_INT)
                                              : _mm_cvtps_ph(near, _MM_FROUND_TO_POS_INF);
        _mm_storel_epi64((__m128i *)(y + i), half);
    }
}

static inline __m256d
scale_from(__m256d x)
{
    const __m128 half = _mm_cvtph_ps(_mm_cvtps_ph(narrow(x, 1), _MM_FROUND_TO_POS_INF));
    return _mm256_max_pd(_mm256_cvtps_pd(half), _mm256_set1_pd(0x1p-24));
}

static inline __m256d
clipped(const float *x, double clip)
{
    const __m256d wide = _mm256_mul_pd(_mm256_set1_pd(clip), _mm256_cvtps_pd(_mm_loadu_ps(x)));
    return _mm256_add_pd(wide, _mm256_setzero_pd()); /* lest zero be -0 */
}

void
lbq_cover_f16_avx2(const float *low, const float *high, double clip, int top, float *scale,
                   float *offset)
{
    const __m256d steps = _mm256_set1_pd(top);
    for (int i = 0; i < LBQ_PANEL; i += 4) {
        const __m256d least = clipped(low + i, clip), most = clipped(high + i, clip);
        const __m128i half = _mm_cvtps_ph(narrow(least, -1), _MM_FROUND_TO_NEG_INF);
        const __m256d from = _mm256_cvtps_pd(_mm_cvtph_ps(half));
        const __m256d less = scale_from(_mm256_div_pd(_mm256_sub_pd(most, least), steps));
        const __m256d more = scale_from(_mm256_div_pd(_mm256_sub_pd(most, from), steps));
        const __m256d end = _mm256_add_pd(from, _mm256_mul_pd(steps, less));
        const __m256d short_of_it = _mm256_cmp_pd(end, most, _CMP_LT_OQ);
        _mm_storeu_ps(scale + i, _mm256_cvtpd_ps(_mm256_blendv_pd(less, more, short_of_it)));
        _mm_storeu_ps(offset + i, _mm256_cvtpd_ps(from));
    }
}
