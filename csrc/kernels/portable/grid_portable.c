/* Sums over sixteen groups and their codes, for the search of scales. */
#include <math.h>
#include <string.h>

#include "kernels/portable/portable.h"
#include "kernels/refit.h"

void
lbq_lanes_range_f32_portable(const float *w, ptrdiff_t count, float *low, float *high)
{
    float least[LBQ_PANEL], most[LBQ_PANEL];
    memcpy(least, w, sizeof least);
    memcpy(most, w, sizeof most);
    for (ptrdiff_t k = 1; k < count; k++)
        for (int l = 0; l < LBQ_PANEL; l++) {
            const float x = w[k * LBQ_PANEL + l];
            least[l] = x < least[l] ? x : least[l];
            most[l] = x > most[l] ? x : most[l];
        }
    memcpy(low, least, sizeof least);
    memcpy(high, most, sizeof most);
}

void
lbq_centre_f32_portable(float *w, const float *importance, ptrdiff_t count, const float *change,
                        float *moments)
{
    float sum[3][LBQ_PANEL] = {{0}};
    for (ptrdiff_t i = 0; i < count * LBQ_PANEL; i++) {
        const ptrdiff_t l = i % LBQ_PANEL;
        const float share = importance ? importance[i] : 1;
        w[i] = (w[i] - change[l]) * change[LBQ_PANEL + l];
        const float hw = share * w[i];
        sum[0][l] += share;
        sum[1][l] += hw;
        sum[2][l] = fmaf(hw, w[i], sum[2][l]);
    }
    memcpy(moments, sum, sizeof sum);
}

void
lbq_grid_sums_f32_portable(const float *w, const float *importance, ptrdiff_t count,
                           const float *grid, int top, float *sums)
{
    const float limit = (float)top;
    float sum[3][LBQ_PANEL] = {{0}};
    for (ptrdiff_t k = 0; k < count; k++)
        for (int l = 0; l < LBQ_PANEL; l++) {
            const float x = fmaf(w[k * LBQ_PANEL + l], grid[l], grid[LBQ_PANEL + l]);
            float v = x > 0 ? x : 0;
            v = v < limit ? v : limit;
            v = (v + 0x1.8p23f) - 0x1.8p23f; /* rounds, ties to even, without a call */
            const float r = x - v;
            const float hr = importance ? importance[k * LBQ_PANEL + l] * r : r;
            sum[0][l] += hr;
            sum[1][l] = fmaf(hr, v, sum[1][l]);
            sum[2][l] = fmaf(hr, r, sum[2][l]);
        }
    memcpy(sums, sum, sizeof sum);
}

void
lbq_table_sums_f32_portable(const float *w, const float *importance, ptrdiff_t count,
                            const float *grid, float first, int jumps, const float *middle,
                            const float *jump, float *sums)
{
    float sum[3][LBQ_PANEL] = {{0}};
    for (ptrdiff_t k = 0; k < count; k++) {
        float x[LBQ_PANEL], v[LBQ_PANEL];
        for (int l = 0; l < LBQ_PANEL; l++) {
            x[l] = fmaf(w[k * LBQ_PANEL + l], grid[l], grid[LBQ_PANEL + l]);
            v[l] = first;
        }
        for (int j = 0; j < jumps; j++)
            for (int l = 0; l < LBQ_PANEL; l++)
                v[l] += jump[j] * (float)(x[l] > middle[j]);
        for (int l = 0; l < LBQ_PANEL; l++) {
            const float r = x[l] - v[l];
            const float hr = importance ? importance[k * LBQ_PANEL + l] * r : r;
            sum[0][l] += hr;
            sum[1][l] = fmaf(hr, v[l], sum[1][l]);
            sum[2][l] = fmaf(hr, r, sum[2][l]);
        }
    }
    memcpy(sums, sum, sizeof sum);
}

void
lbq_refit_f32_portable(const float *moments, const float *grid, const float *sums, int symmetric,
                       float zero, float *refit)
{
    lbq_refit(moments, grid, sums, symmetric, zero, refit);
}

int
lbq_improve_f32_portable(const float *moments, const float *grid, const float *sums, int symmetric,
                         float zero, float enough, float *best)
{
    return lbq_improve(moments, grid, sums, symmetric, zero, enough, best);
}
