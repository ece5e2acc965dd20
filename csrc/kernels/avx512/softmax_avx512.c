/* Everything that needs exp: softmax, its sums, SwiGLU; tails are masked. */
#include "kernels/avx512/avx512.h"
#include "kernels/avx512/exp_avx512.h"
#include "kernels/avx512/lanes_avx512.h"

static inline double
double_sum(__m512 x)
{
    const __m256 low = _mm512_castps512_ps256(x), high = _mm512_extractf32x8_ps(x, 1);
    return _mm512_reduce_add_pd(_mm512_add_pd(_mm512_cvtps_pd(low), _mm512_cvtps_pd(high)));
}

float
lbq_max_f32_avx512(const float *x, ptrdiff_t count)
{
    __m512 max[4]; /* four chains, since a maximum takes four cycles */
    for (int j = 0; j < 4; j++)
        max[j] = _mm512_set1_ps(x[0]);
    ptrdiff_t i = 0;
    for (; i + 64 <= count; i += 64)
        for (int j = 0; j < 4; j++)
            max[j] = _mm512_max_ps(max[j], _mm512_loadu_ps(x + i + 16 * j));
    for (; i < count; i += 16) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        max[0] = _mm512_mask_max_ps(max[0], mask, max[0], _mm512_maskz_loadu_ps(mask, x + i));
    }
    max[0] = _mm512_max_ps(max[0], max[1]);
    return _mm512_reduce_max_ps(_mm512_max_ps(max[0], _mm512_max_ps(max[2], max[3])));
}

/* x[i] = 2^(x[i] - shift); returns their sum, which trailing zeros would not change. */
static inline float
weigh(float *x, ptrdiff_t count, float shift)
{
    const __m512 shifts = _mm512_set1_ps(shift);
    __m512 total = _mm512_setzero_ps();
    ptrdiff_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512 exp = lbq_exp2_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + i), shifts));
        _mm512_storeu_ps(x + i, exp);
        total = _mm512_add_ps(total, exp);
    }
    if (i < count) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        const __m512 gap = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), shifts);
        const __m512 exp = lbq_exp2_avx512(gap);
        _mm512_mask_storeu_ps(x + i, mask, exp);
        total = _mm512_mask_add_ps(total, mask, total, exp);
    }
    return _mm512_reduce_add_ps(total);
}

/* Sixteen rows at a time: first all maxima, then all exponentials. Row by row, one waits for the
 * other, which takes twice as long. */
void
lbq_softmax_f32_avx512(ptrdiff_t rows, ptrdiff_t count, float *x, ptrdiff_t stride, float *max,
                       float *sum, float *factor)
{
    for (ptrdiff_t first = 0; first < rows; first += 16, x += 16 * stride) {
        const ptrdiff_t here = rows - first < 16 ? rows - first : 16;
        const __mmask16 mask = lbq_lanes_avx512(here);
        _Alignas(64) float shift[16], total[16];
        for (ptrdiff_t r = 0; r < here; r++)
            shift[r] = lbq_max_f32_avx512(x + r * stride, count);
        const __m512 before = _mm512_maskz_loadu_ps(mask, max + first);
        const __m512 shifts = _mm512_max_ps(_mm512_maskz_load_ps(mask, shift), before);
        const __m512 factors = lbq_exp2_avx512(_mm512_sub_ps(before, shifts));
        _mm512_store_ps(shift, shifts);
        for (ptrdiff_t r = 0; r < here; r++)
            total[r] = weigh(x + r * stride, count, shift[r]);
        const __m512 sums = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, sum + first), factors);
        _mm512_mask_storeu_ps(
            sum + first, mask, _mm512_add_ps(sums, _mm512_maskz_load_ps(mask, total)));
        _mm512_mask_storeu_ps(max + first, mask, shifts);
        _mm512_mask_storeu_ps(factor + first, mask, factors);
    }
}

double
lbq_exp_sum_f32_avx512(const float *x, ptrdiff_t count, float shift)
{
    const __m512 shifts = _mm512_set1_ps(shift);
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    ptrdiff_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const __m512 exp = lbq_exp_bounded_avx512(_mm512_sub_ps(_mm512_loadu_ps(x + i), shifts));
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(exp)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(exp, 1)));
    }
    double sum = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
    if (i < count) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        const __m512 gap = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), shifts);
        sum += double_sum(_mm512_maskz_mov_ps(mask, lbq_exp_bounded_avx512(gap)));
    }
    return sum;
}

double
lbq_exp_gap_f32_avx512(const float *p, const float *q, ptrdiff_t count, float p_shift,
                       float q_shift)
{
    const __m512 p_shifts = _mm512_set1_ps(p_shift), q_shifts = _mm512_set1_ps(q_shift);
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (ptrdiff_t i = 0; i < count; i += 16) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        const __m512 a = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, p + i), p_shifts);
        const __m512 b = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, q + i), q_shifts);
        const __m512 exp = _mm512_maskz_mov_ps(mask, lbq_exp_bounded_avx512(a));
        const __m512 gap = _mm512_sub_ps(a, b);
        low = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(exp)),
                              _mm512_cvtps_pd(_mm512_castps512_ps256(gap)),
                              low);
        high = _mm512_fmadd_pd(_mm512_cvtps_pd(_mm512_extractf32x8_ps(exp, 1)),
                               _mm512_cvtps_pd(_mm512_extractf32x8_ps(gap, 1)),
                               high);
    }
    return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}

void
lbq_swiglu_f32_avx512(const float *gate, const float *up, ptrdiff_t count, float *y)
{
    const __m512 one = _mm512_set1_ps(1.0f);
    for (ptrdiff_t i = 0; i < count; i += 16) {
        const __mmask16 mask = lbq_lanes_avx512(count - i);
        const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        const __m512 exp = lbq_exp_avx512(_mm512_sub_ps(_mm512_setzero_ps(), g));
        const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, exp));
        _mm512_mask_storeu_ps(
            y + i, mask, _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(mask, up + i)));
    }
}
