/* Sums over sixteen groups and their codes, eight at a time, so that sums stay in registers. */
#include <immintrin.h>

#include "kernels/avx2/avx2.h"
#include "kernels/refit.h"

void
lbq_lanes_range_f32_avx2(const float *w, ptrdiff_t count, float *low, float *high)
{
    for (int l = 0; l < LBQ_PANEL; l += 8) {
        __m256 least = _mm256_loadu_ps(w + l), most = least;
        for (ptrdiff_t k = 1; k < count; k++) {
            const __m256 x = _mm256_loadu_ps(w + k * LBQ_PANEL + l);
            least = _mm256_min_ps(x, least);
            most = _mm256_max_ps(x, most);
        }
        _mm256_storeu_ps(low + l, least);
        _mm256_storeu_ps(high + l, most);
    }
}

void
lbq_centre_f32_avx2(float *w, const float *importance, ptrdiff_t count, const float *change,
                    float *moments)
{
    const __m256 zero = _mm256_setzero_ps(), one = _mm256_set1_ps(1);
    for (int l = 0; l < LBQ_PANEL; l += 8) {
        const __m256 shift = _mm256_loadu_ps(change + l);
        const __m256 inverse = _mm256_loadu_ps(change + LBQ_PANEL + l);
        __m256 sum[3] = {zero, zero, zero};
        for (ptrdiff_t i = l; i < count * LBQ_PANEL; i += LBQ_PANEL) {
            const __m256 x = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(w + i), shift), inverse);
            const __m256 share = importance ? _mm256_loadu_ps(importance + i) : one;
            const __m256 hx = _mm256_mul_ps(share, x);
            _mm256_storeu_ps(w + i, x);
            sum[0] = _mm256_add_ps(sum[0], share);
            sum[1] = _mm256_add_ps(sum[1], hx);
            sum[2] = _mm256_fmadd_ps(hx, x, sum[2]);
        }
        for (int i = 0; i < 3; i++)
            _mm256_storeu_ps(moments + i * LBQ_PANEL + l, sum[i]);
    }
}

static inline __attribute__((always_inline)) void
add_up(const float *w, const float *h, const int weighted, ptrdiff_t count, const float *grid,
       int top, float *sums)
{
    const __m256 inverse = _mm256_loadu_ps(grid), start = _mm256_loadu_ps(grid + LBQ_PANEL);
    const __m256 zero = _mm256_setzero_ps(), limit = _mm256_set1_ps((float)top);
    __m256 sum[3] = {zero, zero, zero};
    for (ptrdiff_t k = 0; k < count; k++) {
        const __m256 x = _mm256_fmadd_ps(_mm256_loadu_ps(w + k * LBQ_PANEL), inverse, start);
        __m256 v = _mm256_min_ps(_mm256_max_ps(x, zero), limit);
        v = _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 r = _mm256_sub_ps(x, v);
        const __m256 hr = weighted ? _mm256_mul_ps(_mm256_loadu_ps(h + k * LBQ_PANEL), r) : r;
        sum[0] = _mm256_add_ps(sum[0], hr);
        sum[1] = _mm256_fmadd_ps(hr, v, sum[1]);
        sum[2] = _mm256_fmadd_ps(hr, r, sum[2]);
    }
    for (int i = 0; i < 3; i++)
        _mm256_storeu_ps(sums + i * LBQ_PANEL, sum[i]);
}

void
lbq_grid_sums_f32_avx2(const float *w, const float *importance, ptrdiff_t count, const float *grid,
                       int top, float *sums)
{
    for (int l = 0; l < LBQ_PANEL; l += 8)
        if (importance)
            add_up(w + l, importance + l, 1, count, grid + l, top, sums + l);
        else
            add_up(w + l, NULL, 0, count, grid + l, top, sums + l);
}

void
lbq_table_sums_f32_avx2(const float *w, const float *importance, ptrdiff_t count, const float *grid,
                        float first, int jumps, const float *middle, const float *jump, float *sums)
{
    for (int l = 0; l < LBQ_PANEL; l += 8) {
        const __m256 inverse = _mm256_loadu_ps(grid + l);
        const __m256 start = _mm256_loadu_ps(grid + LBQ_PANEL + l), zero = _mm256_setzero_ps();
        __m256 sum[3] = {zero, zero, zero};
        for (ptrdiff_t k = l; k < count * LBQ_PANEL; k += LBQ_PANEL) {
            const __m256 x = _mm256_fmadd_ps(_mm256_loadu_ps(w + k), inverse, start);
            __m256 v = _mm256_set1_ps(first);
            for (int j = 0; j < jumps; j++) {
                const __m256 above = _mm256_cmp_ps(x, _mm256_set1_ps(middle[j]), _CMP_GT_OQ);
                v = _mm256_add_ps(v, _mm256_and_ps(above, _mm256_set1_ps(jump[j])));
            }
            __m256 hr = _mm256_sub_ps(x, v);
            const __m256 r = hr;
            if (importance)
                hr = _mm256_mul_ps(_mm256_loadu_ps(importance + k), r);
            sum[0] = _mm256_add_ps(sum[0], hr);
            sum[1] = _mm256_fmadd_ps(hr, v, sum[1]);
            sum[2] = _mm256_fmadd_ps(hr, r, sum[2]);
        }
        for (int i = 0; i < 3; i++)
            _mm256_storeu_ps(sums + i * LBQ_PANEL + l, sum[i]);
    }
}

void
lbq_refit_f32_avx2(const float *moments, const float *grid, const float *sums, int symmetric,
                   float zero, float *refit)
{
    lbq_refit(moments, grid, sums, symmetric, zero, refit);
}

int
lbq_improve_f32_avx2(const float *moments, const float *grid, const float *sums, int symmetric,
                     float zero, float enough, float *best)
{
    return lbq_improve(moments, grid, sums, symmetric, zero, enough, best);
}
