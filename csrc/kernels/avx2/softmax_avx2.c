/* Everything that needs exp: softmax, its sums, SwiGLU; tails are masked. */
#include "kernels/avx2/avx2.h"
#include "kernels/avx2/exp_avx2.h"
#include "kernels/avx2/sum_avx2.h"

/* Mask of the first `left` lanes, all of them if left >= 8. */
static inline __m256i
lanes(ptrdiff_t left)
{
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < 8 ? (int)left : 8), index);
}

float
lbq_max_f32_avx2(const float *x, ptrdiff_t count)
{
    float max = x[0];
    ptrdiff_t i = 0;
    if (count >= 8) {
        __m256 maxima = _mm256_loadu_ps(x);
        for (i = 8; i + 8 <= count; i += 8)
            maxima = _mm256_max_ps(maxima, _mm256_loadu_ps(x + i));
        max = lbq_max_avx2(maxima);
    }
    for (; i < count; i++)
        max = x[i] > max ? x[i] : max;
    return max;
}

/* x[i] = 2^(x[i] - shift); returns their sum, which trailing zeros would not change. */
static inline float
weigh(float *x, ptrdiff_t count, float shift)
{
    const __m256 shifts = _mm256_set1_ps(shift);
    __m256 total = _mm256_setzero_ps();
    ptrdiff_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m256 exp = lbq_exp2_avx2(_mm256_sub_ps(_mm256_loadu_ps(x + i), shifts));
        _mm256_storeu_ps(x + i, exp);
        total = _mm256_add_ps(total, exp);
    }
    if (i < count) {
        const __m256i mask = lanes(count - i);
        __m256 exp = lbq_exp2_avx2(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), shifts));
        exp = _mm256_and_ps(exp, _mm256_castsi256_ps(mask));
        _mm256_maskstore_ps(x + i, mask, exp);
        total = _mm256_add_ps(total, exp);
    }
    return lbq_sum_avx2(total);
}

/* Eight rows at a time: first all maxima, then all exponentials. */
void
lbq_softmax_f32_avx2(ptrdiff_t rows, ptrdiff_t count, float *x, ptrdiff_t stride, float *max,
                     float *sum, float *factor)
{
    for (ptrdiff_t first = 0; first < rows; first += 8, x += 8 * stride) {
        const ptrdiff_t here = rows - first < 8 ? rows - first : 8;
        const __m256i mask = lanes(here);
        _Alignas(32) float shift[8] = {0}, total[8] = {0};
        for (ptrdiff_t r = 0; r < here; r++)
            shift[r] = lbq_max_f32_avx2(x + r * stride, count);
        const __m256 before = _mm256_maskload_ps(max + first, mask);
        const __m256 shifts = _mm256_max_ps(_mm256_load_ps(shift), before);
        const __m256 factors = lbq_exp2_avx2(_mm256_sub_ps(before, shifts));
        _mm256_store_ps(shift, shifts);
        for (ptrdiff_t r = 0; r < here; r++)
            total[r] = weigh(x + r * stride, count, shift[r]);
        const __m256 sums = _mm256_mul_ps(_mm256_maskload_ps(sum + first, mask), factors);
        _mm256_maskstore_ps(sum + first, mask, _mm256_add_ps(sums, _mm256_load_ps(total)));
        _mm256_maskstore_ps(max + first, mask, shifts);
        _mm256_maskstore_ps(factor + first, mask, factors);
    }
}

double
lbq_exp_sum_f32_avx2(const float *x, ptrdiff_t count, float shift)
{
    const __m256 shifts = _mm256_set1_ps(shift);
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    for (ptrdiff_t i = 0; i < count; i += 8) {
        const __m256i mask = lanes(count - i);
        const __m256 gap = _mm256_sub_ps(_mm256_maskload_ps(x + i, mask), shifts);
        const __m256 exp = _mm256_and_ps(lbq_exp_avx2(gap), _mm256_castsi256_ps(mask));
        low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(exp)));
        high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(exp, 1)));
    }
    return lbq_double_sum_avx2(_mm256_add_pd(low, high));
}

double
lbq_exp_gap_f32_avx2(const float *p, const float *q, ptrdiff_t count, float p_shift, float q_shift)
{
    const __m256 p_shifts = _mm256_set1_ps(p_shift), q_shifts = _mm256_set1_ps(q_shift);
    __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
    for (ptrdiff_t i = 0; i < count; i += 8) {
        const __m256i mask = lanes(count - i);
        const __m256 a = _mm256_sub_ps(_mm256_maskload_ps(p + i, mask), p_shifts);
        const __m256 b = _mm256_sub_ps(_mm256_maskload_ps(q + i, mask), q_shifts);
        const __m256 exp = _mm256_and_ps(lbq_exp_avx2(a), _mm256_castsi256_ps(mask));
        const __m256 gap = _mm256_sub_ps(a, b);
        low = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_castps256_ps128(exp)),
                              _mm256_cvtps_pd(_mm256_castps256_ps128(gap)),
                              low);
        high = _mm256_fmadd_pd(_mm256_cvtps_pd(_mm256_extractf128_ps(exp, 1)),
                               _mm256_cvtps_pd(_mm256_extractf128_ps(gap, 1)),
                               high);
    }
    return lbq_double_sum_avx2(_mm256_add_pd(low, high));
}

void
lbq_swiglu_f32_avx2(const float *gate, const float *up, ptrdiff_t count, float *y)
{
    const __m256 one = _mm256_set1_ps(1.0f);
    for (ptrdiff_t i = 0; i < count; i += 8) {
        const __m256i mask = lanes(count - i);
        const __m256 g = _mm256_maskload_ps(gate + i, mask);
        const __m256 exp = lbq_exp_avx2(_mm256_sub_ps(_mm256_setzero_ps(), g));
        const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(one, exp));
        _mm256_maskstore_ps(y + i, mask, _mm256_mul_ps(silu, _mm256_maskload_ps(up + i, mask)));
    }
}
