/* RMSNorm and moments of one row, 32 squares at a time. */
#include <immintrin.h>
#include <math.h>

#include "kernels/avx2/avx2.h"
#include "kernels/avx2/sum_avx2.h"
#include "kernels/norm.h"

void
lbq_rmsnorm_f32_avx2(const float *x, const float *gain, ptrdiff_t count, float epsilon, float *y)
{
    __m256 sum[4];
    for (int j = 0; j < 4; j++)
        sum[j] = _mm256_setzero_ps();
    ptrdiff_t i = 0;
    for (; i + 32 <= count; i += 32)
        for (int j = 0; j < 4; j++) {
            const __m256 v = _mm256_loadu_ps(x + i + 8 * j);
            sum[j] = _mm256_fmadd_ps(v, v, sum[j]);
        }
    float squares =
        lbq_sum_avx2(_mm256_add_ps(_mm256_add_ps(sum[0], sum[1]), _mm256_add_ps(sum[2], sum[3])));
    for (; i < count; i++)
        squares += x[i] * x[i];
    const float mean = squares / (float)count;
    if (!lbq_norm_in_range(mean, epsilon)) {
        lbq_norm_wide(x, gain, count, epsilon, y);
        return;
    }
    const float scale = 1.0f / sqrtf(mean + epsilon);
    for (i = 0; i + 8 <= count; i += 8) {
        __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + i), _mm256_set1_ps(scale));
        if (gain)
            v = _mm256_mul_ps(v, _mm256_loadu_ps(gain + i));
        _mm256_storeu_ps(y + i, v);
    }
    for (; i < count; i++)
        y[i] = gain ? x[i] * scale * gain[i] : x[i] * scale;
}

ptrdiff_t
lbq_moments_f32_avx2(const float *x, ptrdiff_t count, float threshold, float *sum, float *largest)
{
    const __m256 edge = _mm256_set1_ps(threshold), sign = _mm256_set1_ps(-0.0f);
    __m256 total[8], most = _mm256_setzero_ps();
    ptrdiff_t above = 0, i = 0;
    for (int j = 0; j < 8; j++)
        total[j] = _mm256_setzero_ps();
    for (; i + 64 <= count; i += 64)
        for (int j = 0; j < 8; j++) {
            const __m256 v = _mm256_andnot_ps(sign, _mm256_loadu_ps(x + i + 8 * j));
            total[j] = _mm256_add_ps(total[j], v);
            most = _mm256_max_ps(v, most); /* the second operand, if v is a NaN */
            const int exceeds = _mm256_movemask_ps(_mm256_cmp_ps(v, edge, _CMP_GT_OQ));
            above += __builtin_popcount((unsigned)exceeds);
        }
    float lane[64], maximum[8];
    for (int j = 0; j < 8; j++)
        _mm256_storeu_ps(lane + 8 * j, total[j]);
    _mm256_storeu_ps(maximum, most);
    for (int j = 0; i + j < count; j++) {
        const float magnitude = fabsf(x[i + j]);
        lane[j] += magnitude;
        maximum[0] = magnitude > maximum[0] ? magnitude : maximum[0];
        above += magnitude > threshold;
    }
    for (int half = 32; half > 0; half /= 2)
        for (int j = 0; j < half; j++)
            lane[j] += lane[j + half];
    for (int j = 1; j < 8; j++)
        maximum[0] = maximum[j] > maximum[0] ? maximum[j] : maximum[0];
    *sum = lane[0];
    *largest = maximum[0];
    return above;
}
