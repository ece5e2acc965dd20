/* Scales and offsets as they are stored: float16, float32, or multiples of gamma. */
#ifndef LBQ_STORED_H
#define LBQ_STORED_H

#include <float.h>
#include <math.h>

#include "codes/code.h"
#include "core/half.h"

/* Where to round: not above x, next to x, not below x. */
enum { LBQ_DOWN = -1, LBQ_NEAREST, LBQ_UP };

/* The float16 next to x; LBQ_DOWN, LBQ_UP: not above, not below x. */
static inline double
lbq_half_of(double x, int direction)
{
    const double largest = 65504;
    if (fabs(x) >= largest)
        return copysign(largest, x);
    const uint16_t bits = lbq_half_narrow((float)x);
    const double half = lbq_half_widen(bits);
    if (direction == LBQ_NEAREST || half == x || (half > x) == (direction == LBQ_UP))
        return half;
    if (half == 0)
        return direction * 0x1p-24;
    const bool away = (half > 0) == (direction == LBQ_UP);
    return lbq_half_widen(away ? bits + 1 : bits - 1);
}

static inline double
lbq_float_of(double x, int direction)
{
    const float near = (float)x;
    if (direction == LBQ_NEAREST || near == x || (near > x) == (direction == LBQ_UP))
        return near;
    return nextafterf(near, direction == LBQ_UP ? FLT_MAX : -FLT_MAX);
}

static inline double
lbq_stored_scale(const lbq_code *code, double scale, int direction)
{
    if (code->scale_bits == 16)
        return fmax(lbq_half_of(scale, direction), 0x1p-24);
    if (code->scale_bits == 0 || code->gamma == 0)
        return fmax(lbq_float_of(scale, direction), FLT_MIN);
    const double exact = scale / code->gamma;
    const double whole = direction == LBQ_UP     ? ceil(exact)
                         : direction == LBQ_DOWN ? floor(exact)
                                                 : rint(exact);
    const double most = (1 << code->scale_bits) - 1;
    return (float)(fmin(fmax(whole, 1), most) * code->gamma);
}

/* A lone float32 offset is kept as the zero of the matrix, -zero * scale. */
static inline double
lbq_stored_offset(const lbq_code *code, double offset, double scale, int direction)
{
    if (code->symmetric)
        return -(double)code->zero * scale;
    if (code->scale_bits == 16)
        return lbq_half_of(offset, direction);
    const float zero = (float)(-offset / scale);
    return -zero * (float)scale;
}

#endif
