/* exp(x) and 2^x in plain C, without a branch so that compilers vectorise loops over them. */
#ifndef LBQ_EXP_PORTABLE_H
#define LBQ_EXP_PORTABLE_H

#include <stdint.h>
#include <string.h>

#include "kernels/exp.h"

static inline float
lbq_power_of_two(int32_t exponent)
{
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float
lbq_nearest(float x)
{
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    return (x + magic) - magic;
}

/* p 2^n */
static inline float
lbq_scaled(float p, float n)
{
    const int32_t whole = (int32_t)n, half = whole >> 1; /* 2^128 has no float: two factors */
    return p * lbq_power_of_two(half) * lbq_power_of_two(whole - half);
}

static inline float
lbq_exp(float x)
{
    x = x < LBQ_EXP_LOW ? LBQ_EXP_LOW : x;
    x = x > LBQ_EXP_HIGH ? LBQ_EXP_HIGH : x;
    const float n = lbq_nearest(x * LBQ_EXP_LOG2E);
    const float r = (x - n * LBQ_EXP_LN2_HIGH) - n * LBQ_EXP_LN2_LOW;
    float p = LBQ_EXP_C6;
    p = p * r + LBQ_EXP_C5;
    p = p * r + LBQ_EXP_C4;
    p = p * r + LBQ_EXP_C3;
    p = p * r + LBQ_EXP_C2;
    p = p * (r * r) + r + 1.0f;
    return lbq_scaled(p, n);
}

/* For x <= 0. */
static inline float
lbq_exp2(float x)
{
    x = x < LBQ_EXP2_LOW ? LBQ_EXP2_LOW : x;
    const float n = lbq_nearest(x), r = x - n;
    float p = LBQ_EXP2_C6;
    p = p * r + LBQ_EXP2_C5;
    p = p * r + LBQ_EXP2_C4;
    p = p * r + LBQ_EXP2_C3;
    p = p * r + LBQ_EXP2_C2;
    p = p * r + LBQ_EXP2_C1;
    return lbq_scaled(p * r + 1.0f, n);
}

#endif
