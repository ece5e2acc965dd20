/* The least squares refit of sixteen grids, in C without branches, which the compiler vectorises
 * for each instruction set. */
#ifndef LBQ_REFIT_H
#define LBQ_REFIT_H

#include "kernels/kernels.h"

/* refit_f32 of list.h. */
static inline void
lbq_refit(const float *restrict moments, const float *restrict grid, const float *restrict sums,
          int symmetric, float zero, float *restrict refit)
{
    /* A relative spread of v below this is rounding noise. */
    const float least = 1e-6f, free = !symmetric;
    for (int l = 0; l < LBQ_PANEL; l++) {
        const float n = moments[l], w = moments[LBQ_PANEL + l], ww = moments[2 * LBQ_PANEL + l];
        const float share = free * moments[3 * LBQ_PANEL + l];
        const float r = sums[l], rv = sums[LBQ_PANEL + l], rr = sums[2 * LBQ_PANEL + l];
        const float inverse = grid[l], start = grid[LBQ_PANEL + l];
        const float scale = grid[2 * LBQ_PANEL + l], offset = grid[3 * LBQ_PANEL + l];
        const float x = inverse * w + start * n;
        const float xx = inverse * (inverse * ww + 2 * start * w) + start * start * n;
        const float v = x - r, vv = xx - 2 * rv - rr;
        /* r ~ a v + b, or a (v - zero) if symmetric. */
        const float mean = zero + share * v, mean_r = share * r;
        const float spread = vv - 2 * mean * v + mean * mean * n;
        const float shared = rv - r * mean;
        const float found = (float)(spread > least * vv);
        const float a = shared / (spread * found + (1 - found));
        const float wider = (scale + scale * a) * found;
        const float left = rr - r * mean_r - a * shared;
        const float squared = scale * scale;
        refit[l] = squared * rr;
        refit[LBQ_PANEL + l] = wider > 0 ? wider : 0;
        refit[2 * LBQ_PANEL + l] = free * (offset + scale * (mean_r - a * mean)) - zero * wider;
        refit[3 * LBQ_PANEL + l] = squared * (left > 0 ? left : 0);
    }
}

/* improve_f32 of list.h. */
static inline int
lbq_improve(const float *restrict moments, const float *restrict grid, const float *restrict sums,
            int symmetric, float zero, float enough, float *restrict best)
{
    float refit[4 * LBQ_PANEL];
    lbq_refit(moments, grid, sums, symmetric, zero, refit);
    int improved = 0;
    for (int l = 0; l < LBQ_PANEL; l++) {
        const float scale = refit[LBQ_PANEL + l], offset = refit[2 * LBQ_PANEL + l];
        const float error = refit[3 * LBQ_PANEL + l], before = best[l];
        const int better = (scale > 0) & (error < before * enough);
        improved |= better;
        best[l] = better ? error : before;
        best[LBQ_PANEL + l] = better ? scale : best[LBQ_PANEL + l];
        best[2 * LBQ_PANEL + l] = better ? offset : best[2 * LBQ_PANEL + l];
    }
    return improved;
}

#endif
