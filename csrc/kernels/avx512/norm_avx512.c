/* RMSNorm and moments of one row, 64 squares at a time. */
#include <immintrin.h>
#include <math.h>

#include "kernels/avx512/avx512.h"
#include "kernels/avx512/lanes_avx512.h"
#include "kernels/norm.h"

void
lbq_rmsnorm_f32_avx512(const float *x, const float *gain, ptrdiff_t count, float epsilon, float *y)
{
    __m512 sum[4];
    for (int j = 0; j < 4; j++)
        sum[j] = _mm512_setzero_ps();
    ptrdiff_t i = 0;
    for (; i + 64 <= count; i += 64)
        for (int j = 0; j < 4; j++) {
            const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
            sum[j] = _mm512_fmadd_ps(v, v, sum[j]);
        }
    for (; i < count; i += 16) {
        const __m512 v = _mm512_maskz_loadu_ps(lbq_lanes_avx512(count - i), x + i);
        sum[0] = _mm512_fmadd_ps(v, v, sum[0]);
    }
    const __m512 total =
        _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3]));
    const float mean = _mm512_reduce_add_ps(total) / (float)count;
    if (!lbq_norm_in_range(mean, epsilon)) {
        lbq_norm_wide(x, gain, count, epsilon, y);
        return;
    }
    const __m512 scale = _mm512_set1_ps(1.0f / sqrtf(mean + epsilon));
    for (i = 0; i < count; i += 16) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), scale);
        if (gain)
            v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(mask, gain + i));
        _mm512_mask_storeu_ps(y + i, mask, v);
    }
}

ptrdiff_t
lbq_moments_f32_avx512(const float *x, ptrdiff_t count, float threshold, float *sum, float *largest)
{
    __m512 total[4], most[4];
    const __m512 edge = _mm512_set1_ps(threshold);
    ptrdiff_t above = 0, i = 0;
    for (int j = 0; j < 4; j++)
        total[j] = most[j] = _mm512_setzero_ps();
    for (; i < count; i += 64)
        for (int j = 0; j < 4 && i + 16 * j < count; j++) {
            const __mmask16 mask = lbq_lanes_avx512(count - i - 16 * j);
            const __m512 v = _mm512_abs_ps(_mm512_maskz_loadu_ps(mask, x + i + 16 * j));
            total[j] = _mm512_add_ps(total[j], v);
            most[j] = _mm512_max_ps(v, most[j]); /* the second operand, if v is a NaN */
            const __mmask16 exceeds = _mm512_mask_cmp_ps_mask(mask, v, edge, _CMP_GT_OQ);
            above += __builtin_popcount(exceeds);
        }
    const __m512 s =
        _mm512_add_ps(_mm512_add_ps(total[0], total[2]), _mm512_add_ps(total[1], total[3]));
    const __m256 high = _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(s), 1));
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(s), high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    *sum = _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    *largest = _mm512_reduce_max_ps(
        _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3])));
    return above;
}
