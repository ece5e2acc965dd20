/* Sums over sixteen groups and their codes, in a vector. */
#include <immintrin.h>

#include "kernels/avx512/avx512.h"
#include "kernels/refit.h"

void
lbq_lanes_range_f32_avx512(const float *w, ptrdiff_t count, float *low, float *high)
{
    __m512 least = _mm512_loadu_ps(w), most = least;
    for (ptrdiff_t k = 1; k < count; k++) {
        const __m512 x = _mm512_loadu_ps(w + k * LBQ_PANEL);
        least = _mm512_min_ps(x, least);
        most = _mm512_max_ps(x, most);
    }
    _mm512_storeu_ps(low, least);
    _mm512_storeu_ps(high, most);
}

void
lbq_centre_f32_avx512(float *w, const float *importance, ptrdiff_t count, const float *change,
                      float *moments)
{
    const __m512 shift = _mm512_loadu_ps(change), inverse = _mm512_loadu_ps(change + LBQ_PANEL);
    const __m512 zero = _mm512_setzero_ps(), one = _mm512_set1_ps(1);
    __m512 sum[3] = {zero, zero, zero};
    for (ptrdiff_t i = 0; i < count * LBQ_PANEL; i += LBQ_PANEL) {
        const __m512 x = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(w + i), shift), inverse);
        const __m512 share = importance ? _mm512_loadu_ps(importance + i) : one;
        const __m512 hx = _mm512_mul_ps(share, x);
        _mm512_storeu_ps(w + i, x);
        sum[0] = _mm512_add_ps(sum[0], share);
        sum[1] = _mm512_add_ps(sum[1], hx);
        sum[2] = _mm512_fmadd_ps(hx, x, sum[2]);
    }
    for (int i = 0; i < 3; i++)
        _mm512_storeu_ps(moments + i * LBQ_PANEL, sum[i]);
}

static inline __attribute__((always_inline)) void
add_up(const float *w, const float *h, const int weighted, ptrdiff_t count, const float *grid,
       int top, float *sums)
{
    const __m512 inverse = _mm512_loadu_ps(grid), start = _mm512_loadu_ps(grid + LBQ_PANEL);
    const __m512 zero = _mm512_setzero_ps(), limit = _mm512_set1_ps((float)top);
    __m512 sum[3] = {zero, zero, zero};
    for (ptrdiff_t k = 0; k < count; k++) {
        const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(w + k * LBQ_PANEL), inverse, start);
        __m512 v = _mm512_min_ps(_mm512_max_ps(x, zero), limit);
        v = _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 r = _mm512_sub_ps(x, v);
        const __m512 hr = weighted ? _mm512_mul_ps(_mm512_loadu_ps(h + k * LBQ_PANEL), r) : r;
        sum[0] = _mm512_add_ps(sum[0], hr);
        sum[1] = _mm512_fmadd_ps(hr, v, sum[1]);
        sum[2] = _mm512_fmadd_ps(hr, r, sum[2]);
    }
    for (int i = 0; i < 3; i++)
        _mm512_storeu_ps(sums + i * LBQ_PANEL, sum[i]);
}

void
lbq_grid_sums_f32_avx512(const float *w, const float *importance, ptrdiff_t count,
                         const float *grid, int top, float *sums)
{
    if (importance)
        add_up(w, importance, 1, count, grid, top, sums);
    else
        add_up(w, NULL, 0, count, grid, top, sums);
}

void
lbq_table_sums_f32_avx512(const float *w, const float *importance, ptrdiff_t count,
                          const float *grid, float first, int jumps, const float *middle,
                          const float *jump, float *sums)
{
    const __m512 inverse = _mm512_loadu_ps(grid), start = _mm512_loadu_ps(grid + LBQ_PANEL);
    const __m512 zero = _mm512_setzero_ps();
    __m512 sum[3] = {zero, zero, zero};
    for (ptrdiff_t k = 0; k < count; k++) {
        const __m512 x = _mm512_fmadd_ps(_mm512_loadu_ps(w + k * LBQ_PANEL), inverse, start);
        __m512 v = _mm512_set1_ps(first);
        for (int j = 0; j < jumps; j++) {
            const __mmask16 above = _mm512_cmp_ps_mask(x, _mm512_set1_ps(middle[j]), _CMP_GT_OQ);
            v = _mm512_add_ps(v, _mm512_maskz_mov_ps(above, _mm512_set1_ps(jump[j])));
        }
        __m512 hr = _mm512_sub_ps(x, v);
        const __m512 r = hr;
        if (importance)
            hr = _mm512_mul_ps(_mm512_loadu_ps(importance + k * LBQ_PANEL), r);
        sum[0] = _mm512_add_ps(sum[0], hr);
        sum[1] = _mm512_fmadd_ps(hr, v, sum[1]);
        sum[2] = _mm512_fmadd_ps(hr, r, sum[2]);
    }
    for (int i = 0; i < 3; i++)
        _mm512_storeu_ps(sums + i * LBQ_PANEL, sum[i]);
}

void
lbq_refit_f32_avx512(const float *moments, const float *grid, const float *sums, int symmetric,
                     float zero, float *refit)
{
    lbq_refit(moments, grid, sums, symmetric, zero, refit);
}

int
lbq_improve_f32_avx512(const float *moments, const float *grid, const float *sums, int symmetric,
                       float zero, float enough, float *best)
{
    return lbq_improve(moments, grid, sums, symmetric, zero, enough, best);
}
