/* Rounds scales and offsets of LBQ_PANEL groups to stored form, and finds grids that cover the
 * groups' ranges. */
#include "codes/stored.h"

#include <float.h>
#include <math.h>
#include <string.h>

#include "kernels/kernels.h"

enum { LANES = LBQ_PANEL };

typedef double wide[LANES];

static void
halves_of(const double *x, int direction, double *stored)
{
    float value[LANES];
    for (int l = 0; l < LANES; l++)
        value[l] = (float)x[l];
    lbq_kernel.round_f16(value, direction, value);
    for (int l = 0; l < LANES; l++)
        stored[l] = (double)value[l];
}

static double
float_of(double x, int direction)
{
    const float near = (float)x;
    if (direction == LBQ_NEAREST || near == x || (near > x) == (direction == LBQ_UP))
        return near;
    return nextafterf(near, direction == LBQ_UP ? FLT_MAX : -FLT_MAX);
}

static double
multiple_of(const lbq_code *code, double x, int direction)
{
    const double exact = x / code->unit;
    const double whole = direction == LBQ_UP     ? ceil(exact)
                         : direction == LBQ_DOWN ? floor(exact)
                                                 : rint(exact);
    const double most = (1 << code->scale_bits) - 1;
    return (float)(fmin(fmax(whole, 1), most) * code->unit);
}

float
lbq_coarse_scale(const lbq_code *code)
{
    if (code->scale_bits == 16)
        return code->symmetric ? 0x1p-24f : 0x1p-21f;
    return code->scale_bits == 0 || code->unit == 0 ? FLT_MIN : code->unit;
}

bool
lbq_any_coarse(const lbq_code *code, const float *scale)
{
    const float coarse = lbq_coarse_scale(code);
    bool any = false;
    for (int l = 0; l < LANES; l++)
        any |= scale[l] <= coarse;
    return any;
}

bool
lbq_grid_reaches(const lbq_code *code, float low, float high, float scale, float offset)
{
    const float most = code->scale_bits == 16 ? 65504 : 1e30f;
    const float stored = fmaxf(scale, code->symmetric ? 0 : fabsf(offset));
    return fmaxf(-low, high) <= 1e30f && stored < most;
}

void
lbq_store_scales(const lbq_code *code, int direction, double *scale)
{
    if (code->scale_bits == 16) {
        halves_of(scale, direction, scale);
        for (int l = 0; l < LBQ_PANEL; l++)
            scale[l] = scale[l] > 0x1p-24 ? scale[l] : 0x1p-24;
    } else if (code->scale_bits == 0 || code->unit == 0) {
        for (int l = 0; l < LBQ_PANEL; l++)
            scale[l] = fmax(float_of(scale[l], direction), FLT_MIN);
    } else {
        for (int l = 0; l < LBQ_PANEL; l++)
            scale[l] = multiple_of(code, scale[l], direction);
    }
}

void
lbq_store_offsets(const lbq_code *code, const double *scale, int direction, double *offset)
{
    if (code->symmetric) {
        for (int l = 0; l < LBQ_PANEL; l++)
            offset[l] = -(double)code->zero * scale[l];
    } else if (code->scale_bits == 16) {
        halves_of(offset, direction, offset);
    } else {
        for (int l = 0; l < LBQ_PANEL; l++) {
            const float zero = (float)(-offset[l] / scale[l]);
            offset[l] = -zero * (float)scale[l];
        }
    }
}

/* How far the levels reach above and below the fixed zero; infinity on a side without levels, so
 * that it needs no scale. */
static void
reach_of(const lbq_code *code, float *above, float *below)
{
    const float first = code->levels ? code->levels[0] : 0;
    const float last = code->levels ? code->levels[code->count - 1] : (float)(code->count - 1);
    *above = last > code->zero ? last - code->zero : HUGE_VALF;
    *below = code->zero > first ? code->zero - first : HUGE_VALF;
}

lbq_cover
lbq_cover_of(const lbq_code *code, double clip)
{
    lbq_cover cover = {
        .clip = (float)clip,
        .has_offset = !code->symmetric,
        .above = (float)(code->count - 1),
        .below = HUGE_VALF,
    };
    if (code->symmetric) {
        cover.zero = code->zero;
        reach_of(code, &cover.above, &cover.below);
    }
    return cover;
}

void
lbq_grids_over(const lbq_code *code, const double *low, const double *high, double *scale,
               double *offset)
{
    float above, below;
    reach_of(code, &above, &below);
    for (int l = 0; l < LANES && code->symmetric; l++) {
        const double up = high[l] / (double)above, down = -low[l] / (double)below;
        const double most = up > down ? up : down;
        scale[l] = most > 0 ? most : 0;
        offset[l] = -(double)code->zero * scale[l];
    }
    for (int l = 0; l < LANES && !code->symmetric; l++) {
        scale[l] = (high[l] - low[l]) / (code->count - 1);
        offset[l] = low[l];
    }
}

/* The same, rounded for float32. Offsets are -zero * scale there and cannot reach a single value
 * without a scale: its grid starts from 0. */
static void
lone_grids_over(const lbq_code *code, const double *low, const double *high, double *scale,
                double *offset)
{
    wide from, to, wider, shifted;
    for (int l = 0; l < LANES; l++) {
        from[l] = low[l] == high[l] && low[l] > 0 ? 0 : low[l];
        to[l] = low[l] == high[l] && high[l] < 0 ? 0 : high[l];
    }
    lbq_grids_over(code, from, to, scale, offset);
    lbq_store_scales(code, LBQ_UP, scale);
    lbq_store_offsets(code, scale, LBQ_DOWN, offset);
    for (int l = 0; l < LANES; l++) {
        wider[l] = (to[l] - offset[l]) / (code->count - 1);
        shifted[l] = offset[l];
    }
    lbq_store_scales(code, LBQ_UP, wider);
    lbq_store_offsets(code, wider, LBQ_DOWN, shifted);
    for (int l = 0; l < LANES; l++) {
        const bool short_of_it = offset[l] + (code->count - 1) * scale[l] < to[l];
        scale[l] = short_of_it ? wider[l] : scale[l];
        offset[l] = short_of_it ? shifted[l] : offset[l];
    }
}

void
lbq_range_fit(const lbq_code *code, double clip, const float *low, const float *high, float *scale,
              float *offset)
{
    if (code->scale_bits == 16) {
        const lbq_cover cover = lbq_cover_of(code, clip);
        float grid[2 * LANES];
        lbq_kernel.cover_f16(low, high, &cover, grid);
        memcpy(scale, grid, sizeof grid / 2);
        memcpy(offset, grid + LANES, sizeof grid / 2);
        return;
    }
    wide from, to, s, o;
    for (int l = 0; l < LANES; l++) {
        from[l] = clip * (double)low[l];
        to[l] = clip * (double)high[l];
    }
    if (code->symmetric) {
        lbq_grids_over(code, from, to, s, o);
        lbq_store_scales(code, LBQ_UP, s);
        lbq_store_offsets(code, s, LBQ_DOWN, o);
    } else {
        lone_grids_over(code, from, to, s, o);
    }
    for (int l = 0; l < LANES; l++) {
        scale[l] = (float)s[l];
        offset[l] = (float)o[l];
    }
}

/* Sums of importance (NULL: ones) and of importance w^2 in each lane. */
static void
second_moments(const lbq_groups *in, const float *importance, double *total, double *squares)
{
    memset(total, 0, sizeof(wide));
    memset(squares, 0, sizeof(wide));
    for (ptrdiff_t i = 0; i < in->count * LANES + in->rest; i++) {
        const double w = (double)in->w[i], h = importance ? (double)importance[i] : 1;
        total[i % LANES] += h;
        squares[i % LANES] += h * w * w;
    }
    for (int l = 1; in->together && l < LANES; l++) {
        total[0] += total[l];
        squares[0] += squares[l];
    }
    for (int l = 1; in->together && l < LANES; l++) {
        total[l] = total[0];
        squares[l] = squares[0];
    }
}

void
lbq_fit_deviation(const lbq_code *code, const lbq_groups *groups, double deviation, float *scale,
                  float *offset)
{
    wide total, squares, wanted, s, o = {0};
    second_moments(groups, groups->importance, total, squares);
    if (total[0] == 0) /* importance is all zero */
        second_moments(groups, NULL, total, squares);
    for (int l = 0; l < LANES; l++)
        wanted[l] = s[l] = sqrt(squares[l] / total[l]) / deviation;
    lbq_store_scales(code, LBQ_NEAREST, s);
    lbq_store_offsets(code, s, LBQ_NEAREST, o);
    for (int l = 0; l < LANES; l++) {
        scale[l] = code->scale_bits == 16 && wanted[l] <= 0x1p-25 ? 0 : (float)s[l];
        offset[l] = (float)o[l];
    }
}
