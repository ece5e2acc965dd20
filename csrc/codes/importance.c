/* Shares of columns, and the error of grids in float64. */
#include "codes/importance.h"

#include <math.h>
#include <string.h>

enum {
    LANES = LBQ_PANEL,
    FEW = 4, /* columns that a grid can fit closely at the same time */
};

/* float32 finds the best grids down to this ratio of shares; at 2^-24 it loses the smaller ones. */
#define SMALL 0x1p-20f

/* Smaller shares, including 0, are raised to this one, so that no column is ignored. Stored scales
 * cannot fit the large shares more exactly anyway. */
#define LEAST_SHARE 0x1p-40

lbq_status
lbq_check_importance(ptrdiff_t cols, const float *importance)
{
    for (ptrdiff_t k = 0; k < cols; k++)
        LBQ_REQUIRE(importance[k] >= 0 && isfinite(importance[k]),
                    LBQ_BAD_VALUE,
                    "importance[%td] is %g, expected finite numbers >= 0",
                    k,
                    (double)importance[k]);
    return LBQ_OK;
}

lbq_status
lbq_importance_shares(ptrdiff_t cols, ptrdiff_t group, const float *importance, float *shares)
{
    LBQ_TRY(lbq_check_importance(cols, importance));
    float most = 0;
    for (ptrdiff_t k = 0; k < cols; k++)
        most = fmaxf(most, importance[k]);
    for (ptrdiff_t begin = 0, end; begin < cols; begin = end) {
        end = group < cols - begin ? begin + group : cols;
        float largest = 0;
        for (ptrdiff_t k = begin; k < end; k++)
            largest = fmaxf(largest, importance[k]);
        int exponent = 0;
        frexp(largest > 0 ? (double)largest / (double)most : 1, &exponent);
        const double unit = ldexp(1, -exponent);
        for (ptrdiff_t k = begin; k < end; k++)
            shares[k] = largest > 0 ? (float)((double)importance[k] / (double)most * unit) : 0;
    }
    return LBQ_OK;
}

static ptrdiff_t
size_of(const lbq_groups *groups)
{
    return groups->count * LANES + groups->rest;
}

bool
lbq_dominated(const lbq_groups *groups, const float *shares, double total)
{
    /* A quick test: FEW large shares and many small ones add up to no more. */
    if (!(total <= FEW + 1))
        return false;
    const ptrdiff_t size = size_of(groups), step = groups->together ? 1 : LANES;
    ptrdiff_t large = 0;
    for (ptrdiff_t i = 0; i < size; i += step)
        large += shares[i] >= SMALL;
    return large <= FEW && large * step < size;
}

static double
share_of(const float *shares, ptrdiff_t i)
{
    return shares ? fmax((double)shares[i], LEAST_SHARE) : 1;
}

static double
power(double x, double norm)
{
    return norm == 2 ? x * x : pow(fabs(x), norm);
}

/* Adds up the lanes if they are parts of one group. */
static void
join(const lbq_groups *groups, double *x)
{
    double total = 0;
    for (int l = 0; groups->together && l < LANES; l++)
        total += x[l];
    for (int l = 0; groups->together && l < LANES; l++)
        x[l] = total;
}

/* A weight's nearest level v, and the residual r = (w - offset) / scale - v. */
typedef struct {
    double v, r;
} place;

static place
place_of(const lbq_code *code, double w, double scale, double offset)
{
    const uint8_t value = lbq_code_encode(code, w, scale, offset);
    const double v = lbq_code_decode(code, value, 1, 0);
    return (place){v, (w - offset) / scale - v};
}

/* Sums are taken about the weight with the largest share: its terms, possibly large, vanish. */
static ptrdiff_t
anchor_of(const lbq_groups *groups, const float *shares, int lane)
{
    const ptrdiff_t size = size_of(groups), step = groups->together ? 1 : LANES;
    ptrdiff_t found = groups->together ? 0 : lane;
    for (ptrdiff_t i = found; shares && i < size; i += step)
        found = shares[i] > shares[found] ? i : found;
    return found;
}

void
lbq_judge_grid(const lbq_code *code, const lbq_groups *groups, const float *shares, double norm,
               const double *scale, const double *offset, lbq_judgement *judgement)
{
    enum { N, V, R, VV, VR, ERROR, SUMS };
    double sum[SUMS][LANES] = {{0}};
    place about[LANES];
    for (int l = 0; l < LANES; l++) {
        const double w = (double)groups->w[anchor_of(groups, shares, l)];
        about[l] = code->symmetric ? (place){(double)code->zero, 0}
                                   : place_of(code, w, scale[l], offset[l]);
    }
    for (ptrdiff_t i = 0; i < size_of(groups); i++) {
        const ptrdiff_t l = i % LANES;
        const place at = place_of(code, (double)groups->w[i], scale[l], offset[l]);
        const double h = share_of(shares, i), v = at.v - about[l].v, r = at.r - about[l].r;
        sum[N][l] += h;
        sum[V][l] += h * v;
        sum[R][l] += h * r;
        sum[VV][l] += h * v * v;
        sum[VR][l] += h * v * r;
        sum[ERROR][l] += h * power(scale[l] * at.r, norm);
    }
    for (int i = 0; i < SUMS; i++)
        join(groups, sum[i]);
    for (int l = 0; l < LANES; l++) {
        const double free = !code->symmetric, n = sum[N][l];
        const double v = free * sum[V][l] / n, r = free * sum[R][l] / n;
        const double spread = sum[VV][l] - n * v * v;
        const bool found = spread > 1e-12 * sum[VV][l];
        const double a = found ? (sum[VR][l] - n * v * r) / spread : 0;
        const double wider = found ? fmax(scale[l] + scale[l] * a, 0) : 0;
        judgement->error[l] = sum[ERROR][l];
        judgement->scale[l] = wider;
        judgement->offset[l] = code->symmetric
                                   ? -(double)code->zero * wider
                                   : offset[l] + scale[l] * (about[l].r + r - a * (about[l].v + v));
        judgement->level[l] = about[l].v + v;
    }
}

void
lbq_judge_value(const lbq_groups *groups, const float *shares, double norm, const double *value,
                double *error)
{
    memset(error, 0, LANES * sizeof *error);
    for (ptrdiff_t i = 0; i < size_of(groups); i++)
        error[i % LANES] +=
            share_of(shares, i) * power((double)groups->w[i] - value[i % LANES], norm);
    join(groups, error);
}
