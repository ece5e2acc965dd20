/* Moments of what passes through a network, for a monitor. */
#ifndef LBQ_MOMENTS_H
#define LBQ_MOMENTS_H

#include <stddef.h>

#include "core/status.h"

enum { LBQ_TAP_QKV, LBQ_TAP_OUTPUT, LBQ_TAP_MLP, LBQ_TAP_DOWN, LBQ_TAPS };

/* Of one input of a block, over all numbers since a caller set them to 0; counts are exact below
 * 2^53. A NaN makes the sum NaN and is neither the largest nor above. */
typedef struct {      /* five doubles, as callers have them in an array */
    double threshold; /* read only */
    double count;     /* of numbers */
    double above;     /* of these with |x| > threshold */
    double sum;       /* of |x|: float32 over a token, float64 over tokens */
    double largest;   /* |x| */
} lbq_moments;

/* Adds x (tokens, cols): the same bits for any number of threads, on any instruction set, and
 * whether tokens come together or one by one. LBQ_NO_MEMORY. */
lbq_status lbq_moments_add(lbq_moments *moments, ptrdiff_t tokens, ptrdiff_t cols, const float *x);

#endif
